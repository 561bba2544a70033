"""GGUF as a source: transformers' own logits, the named pre-tokenizer, damage named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.unit.models.test_families import streamed_logits, tokens
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocketlm.core.errors import ConfigError, SourceError, UnsupportedModel
from pocketlm.models import open_model, opening
from pocketlm.models.bytes import PositionalFile
from pocketlm.models.gguf_header import read_header
from pocketlm.models.gguf_tokenizer import pre_tokenizer

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY, BLOCKS = 64, 96, 4, 2, 96, 2
Q8, Q4, F16, F32 = (gguf.GGMLQuantizationType[n] for n in ("Q8_0", "Q4_1", "F16", "F32"))


def words() -> list[str]:
    """Two special tokens, then single bytes in GPT-2's spelling, then a merged pair."""
    letters = [chr(code) for code in range(33, 33 + VOCABULARY - 3)]
    return ["<|end|>", "<|start|>", *letters, "ab"]


def write(
    path: Path, pre: str | None = "smollm", types: tuple[Any, ...] = (Q8, Q4, F16), **extra: Any
) -> Path:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(words())
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(name: str, kind: Any, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32) * 0.2 + (len(shape) == 1)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", types[0], VOCABULARY, WIDTH)
    for i in range(BLOCKS):
        kv = KV_HEADS * WIDTH // HEADS
        add(f"blk.{i}.attn_norm.weight", F32, WIDTH)
        add(f"blk.{i}.attn_q.weight", types[1], WIDTH, WIDTH)
        add(f"blk.{i}.attn_k.weight", types[2], kv, WIDTH)
        add(f"blk.{i}.attn_v.weight", types[1], kv, WIDTH)
        add(f"blk.{i}.attn_output.weight", types[0], WIDTH, WIDTH)
        add(f"blk.{i}.ffn_norm.weight", F32, WIDTH)
        add(f"blk.{i}.ffn_gate.weight", types[1], INNER, WIDTH)
        add(f"blk.{i}.ffn_up.weight", types[2], INNER, WIDTH)
        add(f"blk.{i}.ffn_down.weight", types[0], WIDTH, INNER)
    add("output_norm.weight", F32, WIDTH)
    for name, value in extra.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name.replace("__", "."), value)
        elif isinstance(value, str):
            writer.add_string(name.replace("__", "."), value)
        else:
            add(name.replace("__", "."), F32, *value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


def test_logits_are_those_of_transformers(file: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    for name, parameter in reference.named_parameters():
        if "norm" not in name:  # block types are read as float16, stored floats as they are
            parameter.data = parameter.data.half().float()
    with torch.no_grad():
        expected = reference(tokens()).logits
    model = open_model(file)
    assert torch.equal(streamed_logits(model, tokens()), expected)
    assert model.tied
    assert model.dtype == torch.float16
    assert model.context == 128
    assert model.config["architectures"] == ["LlamaForCausalLM"]


def test_values_beyond_float16_and_rows(file: Path) -> None:
    source = open_model(file).source
    whole = source.read("model.embed_tokens.weight")
    assert torch.equal(source.rows("model.embed_tokens.weight", 5, 9), whole[5:9])
    raw = b"".join(bytes(piece) for piece in source.chunks("model.embed_tokens.weight", 1000))
    assert raw == whole.view(torch.uint8).numpy().tobytes()
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.rows(query, 2, 6), source.read(query)[2:6])


def test_tokenizer_and_side_files(file: Path, tmp_path: Path) -> None:
    model = open_model(file)
    tokenizer = model.tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab12<|end|>").input_ids) == [
        "ab",
        "1",
        "2",
        "<|end|>",
    ]
    out = tmp_path / "out"
    out.mkdir()
    for name, data in model.side_files().items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text('{"model_type": "llama"}')
    again = AutoTokenizer.from_pretrained(out)
    assert again("ab12 ab").input_ids == tokenizer("ab12 ab").input_ids
    assert again.eos_token == "<|end|>"
    messages = [{"role": "user", "content": "ab"}]
    assert again.apply_chat_template(messages, tokenize=False) == "ab"
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= model.side_files().keys()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "Ġab", "ĊĊ"]),
        ("gpt-2", ["It", "'s", "Ġ12", "Ġab", "ĊĊ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "Ġab", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "12", "Ġab", "ĊĊ"]),
    ],
)
def test_pre_tokenizers(name: str, pieces: list[str]) -> None:
    got = pre_tokenizer(name, "here").pre_tokenize_str("It's 12 ab\n\n")
    assert [piece for piece, _ in got] == pieces


@pytest.mark.parametrize("pre", ["smolm", None])
def test_unknown_pre_tokenizer(tmp_path: Path, pre: str | None) -> None:
    model = open_model(write(tmp_path / "tiny.gguf", pre=pre))
    with pytest.raises(SourceError, match="smollm" if pre else "does not name"):
        model.tokenizer()


def write_experts(path: Path, inner: int) -> Path:
    """A Qwen3-MoE file: experts of a layer lie in one 3-D tensor."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(inner)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words())
    shapes = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (64, WIDTH),
        "blk.0.attn_k.weight": (32, WIDTH),
        "blk.0.attn_v.weight": (32, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, 64),
        "blk.0.attn_q_norm.weight": (16,),
        "blk.0.attn_k_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate_inp.weight": (4, WIDTH),
        "blk.0.ffn_gate_exps.weight": (4, inner, WIDTH),
        "blk.0.ffn_up_exps.weight": (4, inner, WIDTH),
        "blk.0.ffn_down_exps.weight": (4, WIDTH, inner),
    }
    for name, shape in shapes.items():
        kind = F32 if len(shape) == 1 or "inp" in name else F16
        values = rng.standard_normal(shape).astype(np.float32) * 0.2 + (len(shape) == 1)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fused_experts_become_linears(tmp_path: Path) -> None:
    # transformers knows one width of experts only, Qwen3-30B's
    path = write_experts(tmp_path / "experts.gguf", 768)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, experts_implementation="eager"
    )
    model = open_model(path)
    assert model.linear_shapes()["model.layers.0.mlp.experts.3.gate_proj"] == (768, WIDTH)
    with torch.no_grad():
        expected = reference.eval()(tokens()).logits
    torch.testing.assert_close(streamed_logits(model, tokens()), expected, rtol=1e-5, atol=1e-5)
    other = open_model(write_experts(tmp_path / "other.gguf", 32))
    assert other.linear_shapes()["model.layers.0.mlp.experts.3.gate_proj"] == (32, WIDTH)


def cut(raw: bytes) -> bytes:
    return raw[:-100]


def cut_in_header(raw: bytes) -> bytes:
    return raw[:700]


def other_magic(raw: bytes) -> bytes:
    return b"GGML" + raw[4:]


def other_version(raw: bytes) -> bytes:
    return raw[:4] + struct.pack("<I", 9) + raw[8:]


def many_tensors(raw: bytes) -> bytes:
    return raw[:8] + struct.pack("<Q", 1 << 50) + raw[16:]


def many_keys(raw: bytes) -> bytes:
    return raw[:16] + struct.pack("<Q", 1 << 50) + raw[24:]


def long_string(raw: bytes) -> bytes:
    return raw[:24] + struct.pack("<Q", 1 << 62) + raw[32:]


def long_array(raw: bytes) -> bytes:
    at = raw.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    return raw[:at] + struct.pack("<Q", 1 << 40) + raw[at + 8 :]


def wide_tensor(raw: bytes) -> bytes:
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    return raw[:at] + struct.pack("<Q", 1 << 40) + raw[at + 8 :]


def with_type(raw: bytes, number: int) -> bytes:
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 20
    return raw[:at] + struct.pack("<I", number) + raw[at + 4 :]


def unknown_type(raw: bytes) -> bytes:
    return with_type(raw, 999)


def many_blocks(raw: bytes) -> bytes:
    at = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4
    return raw[:at] + struct.pack("<I", 1 << 31) + raw[at + 4 :]


DAMAGES = [cut, cut_in_header, other_magic, other_version, many_tensors, many_keys, long_string]
DAMAGES += [long_array, wide_tensor, unknown_type, many_blocks]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SourceError, match=r"tiny\.gguf"):
        open_model(file)


def test_a_type_that_the_library_cannot_decode(file: Path) -> None:
    file.write_bytes(with_type(file.read_bytes(), gguf.GGMLQuantizationType.I8))
    with pytest.raises(SourceError, match=r"'token_embd\.weight' is I8.*file of other types"):
        open_model(file).source.read("model.embed_tokens.weight")


def test_unknown_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", blk__0__mystery__weight=(WIDTH,))
    with pytest.raises(UnsupportedModel, match="mystery"):
        open_model(path)


def rope_table(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling, base 10000."""
    count, table = WIDTH // HEADS // 2, []
    for i in range(count):
        wavelength = 2 * np.pi * 10000.0 ** (i / count)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(1.0, max(0.0, smooth))
        table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 1, 16, 512), (4, 2, 40, 600), (1, 1, 4, 8192)],
)
def test_rotary_table_of_llama_3(
    tmp_path: Path, factor: float, low: float, high: float, original: int
) -> None:
    table = rope_table(factor, low, high, original)
    model = open_model(write(tmp_path / "tiny.gguf", rope_freqs__weight=table))
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    weights = {
        name: value.float() if "norm" in name else value.half().float()
        for name, value in reference.state_dict().items()
    }
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": float(factor),
        "low_freq_factor": float(low), "high_freq_factor": float(high),
        "original_max_position_embeddings": original,
    }  # fmt: skip
    config = reference.config
    unscaled = streamed_logits(open_model(write(tmp_path / "unscaled.gguf")), tokens())
    config.rope_parameters = scaling
    truth = type(reference)(config).eval()
    truth.load_state_dict(weights)
    with torch.no_grad():
        expected = truth(tokens()).logits
    got = streamed_logits(model, tokens())
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(got, unscaled, atol=1e-5) == (factor == 1)
    assert "rope_freqs.weight" not in model.source.infos()
    if (low, high, original) == (1, 4, 8192) and factor != 1:
        assert model.config["rope_parameters"] == scaling


@pytest.mark.parametrize(
    "table",
    [
        (WIDTH // HEADS // 2,),
        np.array([1, 1, 2, 1, 8, 8, 8, 8], np.float32),
        np.ones(5, np.float32),
    ],
    ids=["random", "not rising", "short"],
)
def test_rotary_table_of_another_kind(tmp_path: Path, table: Any) -> None:
    path = write(tmp_path / "tiny.gguf", rope_freqs__weight=table)
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        open_model(path)


def test_rotary_scaling_that_transformers_ignores(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModel, match="yarn"):
        open_model(path)


def test_demo_model_is_in_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pocketlm\[demo\]"):
        open_model("smollm2-135m")


def test_demo_tokenizer_splits_digits() -> None:
    header = read_header(PositionalFile(opening.demo_file()))
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"
    backend = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    backend.pre_tokenizer = pre_tokenizer("smollm", "demo")
    assert [p for p, _ in backend.pre_tokenizer.pre_tokenize_str("a 42")] == ["a", "Ġ", "4", "2"]
