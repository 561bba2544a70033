"""GGUF files: transformers' reader gives the same model back, the gguf package the same codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.unit.engine.conftest import Compress
from tests.unit.models.families import build
from tests.unit.models.test_families import streamed_logits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pocketlm import api
from pocketlm.core.errors import (
    ConfigError,
    OutputBusy,
    ResourceError,
    UnsupportedLayer,
    UnsupportedModel,
)
from pocketlm.core.spec import GGUF_TYPES, SCHEMES, Recipe
from pocketlm.core.views import End
from pocketlm.engine import export_gguf
from pocketlm.engine.ends import quantized_rows
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.mixture import with_mixture
from pocketlm.formats import shards
from pocketlm.models import open_model
from pocketlm.models.gguf_vocabulary import vocabulary
from pocketlm.recipes import build_recipe

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def bpe_tokenizer(rows: int = 96) -> PreTrainedTokenizerFast:
    """Two special tokens, single bytes in GPT-2's spelling, a merge; fewer ids than rows."""
    letters = [chr(code) for code in range(33, 33 + min(rows, 90) - 4)]
    vocab = {token: i for i, token in enumerate(["<|end|>", "<|start|>", *letters, "ab"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|start|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def saved(directory: Path, family: str, **changes: object) -> Path:
    build(family, **changes).save_pretrained(directory)
    bpe_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 64, "rope_parameters": LLAMA3_ROPE}),
        ("llama-bias-tied", {"attention_bias": False, "mlp_bias": False}),
        ("mistral-window", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("phi3", {}),
        ("mixtral", {}),
        ("qwen2-moe", {}),
        ("qwen3-moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    ],
)
def test_the_same_model_comes_back(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    source = saved(tmp_path / "model", family, **changes)
    tokens = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = streamed_logits(open_model(source), tokens)
    made = api.export(source, tmp_path / "m.gguf", to="gguf")
    assert all(tensor.error == 0 for tensor in made.tensors.values())
    again = open_model(tmp_path / "m.gguf")
    torch.testing.assert_close(streamed_logits(again, tokens), expected, rtol=2e-5, atol=2e-5)
    ours, theirs = bpe_tokenizer(), again.tokenizer()
    assert theirs("ab12 ab").input_ids == ours("ab12 ab").input_ids
    assert theirs.chat_template == TEMPLATE


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows K-quants divide."""
    path = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> torch.Tensor:
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(found)).float()


def interleaved(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    return weight_OI.view(heads, 2, -1, weight_OI.shape[1]).transpose(1, 2).reshape(weight_OI.shape)


def test_a_mixture_keeps_every_code(wide: Path, tmp_path: Path) -> None:
    """compress --scheme Q4_K_M --target gguf, then export: nothing is rounded again."""
    api.compress(
        wide, build_recipe(scheme="Q4_K_M"), tmp_path / "out", target="gguf", samples=4, seq_len=32
    )
    made = api.export(tmp_path / "out", tmp_path / "m.gguf", to="gguf:Q4_K_M")
    assert all(tensor.error == 0 for tensor in made.tensors.values())
    found = tensors(tmp_path / "m.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q6_K"
    assert kinds["output_norm.weight"] == "F32"
    assert "output.weight" not in found
    artifact = open_model(tmp_path / "out", allow_compressed=True).source
    for name, spelled in (("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
        expected = artifact.read(f"model.layers.1.{name}.weight")
        assert torch.equal(values(found[f"blk.1.{spelled}.weight"]), expected)
    query = artifact.read("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(values(found["blk.0.attn_q.weight"]), interleaved(query, 4))
    held = api.export(tmp_path / "out", tmp_path / "held.gguf", to="gguf")
    assert {n: t.type for n, t in held.tensors.items()} == {
        n: t.type for n, t in made.tensors.items()
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts, whose rows K-quants divide."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("mixture") / "model"
    return saved(path, "mixtral", **sizes, num_local_experts=8)


def test_a_mixture_of_experts_keeps_every_code(mixture: Path, tmp_path: Path) -> None:
    """Stacks have types of their own, by llama-quantize's rules for eight experts."""
    recipe = build_recipe({"steps": ["rtn"]}, scheme="Q4_K_M")
    api.compress(mixture, recipe, tmp_path / "out", target="gguf", samples=2, seq_len=32)
    made = api.export(tmp_path / "out", tmp_path / "m.gguf", to="gguf:Q4_K_M")
    overrides = with_mixture(recipe, open_model(mixture)).overrides
    assert overrides["model.layers.1.block_sparse_moe.experts.*.w2"].name == "Q6_K"
    assert len(overrides) == 2 + 2 * (4 + 3)  # embedding, head; attention and stacks of two blocks
    assert all(tensor.error == 0 for tensor in made.tensors.values())
    assert made.tensors["blk.0.ffn_up_exps.weight"].kept
    found = tensors(tmp_path / "m.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["blk.0.attn_k.weight"] == kinds["blk.0.attn_v.weight"] == "Q8_0"
    assert kinds["blk.0.attn_output.weight"] == "Q5_K"
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    artifact = open_model(tmp_path / "out", allow_compressed=True).source
    again = open_model(tmp_path / "m.gguf").source
    for linear, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        stack_EOI = values(found[f"blk.1.ffn_{part}_exps.weight"])
        for expert in (0, 3, 7):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{linear}.weight"
            assert torch.equal(stack_EOI[expert], artifact.read(name))
            assert torch.equal(again.read(name), artifact.read(name).half())
    held = api.export(tmp_path / "out", tmp_path / "held.gguf", to="gguf")
    assert {n: t.type for n, t in held.tensors.items()} == {
        n: t.type for n, t in made.tensors.items()
    }


def test_experts_of_an_engines_format_are_held(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(scheme="W4A16", method="rtn", group_size=32)
    api.compress(mixture, recipe, tmp_path / "out", target="transformers", samples=2, seq_len=32)
    made = api.export(tmp_path / "out", tmp_path / "m.gguf", to="gguf")
    for part in ("gate", "up", "down"):
        stack = made.tensors[f"blk.0.ffn_{part}_exps.weight"]
        assert (stack.type, stack.kept, stack.error) == ("Q4_0", True, 0)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["llama.expert_count"].contents() == 8
    assert fields["llama.expert_used_count"].contents() == 2
    held = export_gguf._Plan._held
    monkeypatch.setattr(
        export_gguf._Plan,
        "_held",
        lambda plan, name: "Q8_0" if ".experts.3." in name else held(plan, name),
    )
    widest = api.export(tmp_path / "out", tmp_path / "other.gguf", to="gguf")
    stack = widest.tensors["blk.0.ffn_up_exps.weight"]
    assert (stack.type, stack.kept) == ("Q8_0", False)
    assert stack.error < 1e-4


def test_experts_are_written_one_by_one(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece that is rounded has more rows than one expert."""
    rows: list[int] = []

    def seen(weight_OI: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(weight_OI))
        return quantized_rows(weight_OI, *rest)

    monkeypatch.setattr(export_gguf, "quantized_rows", seen)
    made = api.export(mixture, tmp_path / "m.gguf", to="gguf:Q8_0")
    assert max(rows) == 256
    assert rows.count(256) >= 2 * 3 * 8
    whole = open_model(mixture).source
    stack_EOI = values(tensors(tmp_path / "m.gguf")["blk.0.ffn_up_exps.weight"])
    experts = [
        whole.read(f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight") for i in range(8)
    ]
    expected_EOI = torch.stack(experts).double()
    error = (stack_EOI - expected_EOI).square().sum() / expected_EOI.square().sum()
    told = made.tensors["blk.0.ffn_up_exps.weight"].error
    assert math.isclose(float(error), told, rel_tol=1e-4)


def test_metadata_as_the_package_reads_it(wide: Path, tmp_path: Path) -> None:
    api.export(wide, tmp_path / "m.gguf", to="gguf:Q8_0")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields

    def of(key: str) -> Any:
        return fields[key].contents()

    assert of("general.architecture") == "llama"
    assert of("general.file_type") == 7
    assert of("llama.attention.head_count_kv") == 2
    assert of("llama.rope.dimension_count") == 64
    assert of("tokenizer.ggml.pre") == "smollm"
    assert of("tokenizer.ggml.merges") == ["a b"]
    assert of("tokenizer.ggml.tokens")[-1] == "[PAD95]"
    assert of("tokenizer.ggml.token_type")[:3] == [3, 3, 1]
    assert of("tokenizer.ggml.token_type")[-1] == 5
    assert of("tokenizer.ggml.add_bos_token") is True
    assert of("tokenizer.chat_template") == TEMPLATE


def test_other_grids_are_held_or_rounded_again(
    wide: Path, tmp_path: Path, compress_from: type[Compress]
) -> None:
    compress_from(wide)(tmp_path / "out", steps=("rtn",), bits=4)
    bpe_tokenizer().save_pretrained(tmp_path / "out")
    made = api.export(tmp_path / "out", tmp_path / "held.gguf", to="gguf")
    down = made.tensors["blk.0.ffn_down.weight"]
    assert (down.type, down.kept, down.error) == ("Q4_0", True, 0)  # bfloat16 scales fit float16
    again = api.export(tmp_path / "out", tmp_path / "other.gguf", to="gguf:Q3_K_S")
    down = again.tensors["blk.0.ffn_down.weight"]
    assert (down.type, down.kept) == ("Q3_K", False)
    assert 1e-3 < down.error < 0.1
    assert any("rounded to their type" in note for note in again.notes)
    lost = values(tensors(tmp_path / "other.gguf")["blk.0.ffn_down.weight"])
    whole = open_model(tmp_path / "out", allow_compressed=True).source.read(
        "model.layers.0.mlp.down_proj.weight"
    )
    error = float((lost - whole).double().square().sum() / whole.double().square().sum())
    assert math.isclose(error, down.error, rel_tol=1e-4)


def test_three_levels(wide: Path, tmp_path: Path) -> None:
    made = api.export(wide, tmp_path / "m.gguf", to="gguf:TQ1_0")
    down = made.tensors["blk.0.ffn_down.weight"]
    assert down.type == "TQ1_0"
    assert 0.15 < down.error < 0.25  # of a normal distribution three levels lose 0.19
    found = values(tensors(tmp_path / "m.gguf")["blk.0.ffn_down.weight"])
    assert all(len(block.abs().unique()) == 2 for block in found.view(-1, 256))


def test_a_mixture_becomes_overrides(wide: Path) -> None:
    model = open_model(wide)
    recipe = with_mixture(build_recipe(scheme="q3_k_m", ignore=("o_proj",)), model)
    assert recipe.overrides["model.layers.0.self_attn.v_proj"].name == "Q5_K"
    assert recipe.overrides["model.layers.1.mlp.gate_proj"].name == "Q3_K"
    assert recipe.overrides["model.embed_tokens"].name == "Q6_K"
    assert recipe.ignores("model.layers.0.self_attn.o_proj")
    given = {"steps": ["rtn"], "ignore": ["v_proj"], "overrides": {"up_proj": {"bits": 8}}}
    kept = build_recipe(given, scheme="q3_k_m", ignore=("o_proj",))
    assert (kept.ignore, list(kept.overrides)) == (("v_proj", "o_proj"), ["up_proj"])
    assert [step.method for step in kept.steps] == ["rtn"]
    with pytest.raises(ConfigError, match="Q3_K_M says bits"):
        build_recipe(scheme="Q3_K_M", bits=3)


def test_grids_of_files_in_the_place_of_wider_ones(wide: Path) -> None:
    plan = api.plan(wide, build_recipe(scheme="W4A16"), target="gguf", samples=4, seq_len=32)
    assert plan.target == "llama.cpp"
    assert any("scale for each 32 columns" in note for note in plan.notes.values())
    with pytest.raises(UnsupportedLayer, match=r"--target llama\.cpp"):
        api.plan(wide, build_recipe(scheme="Q4_K_M"), samples=4, seq_len=32)


@pytest.mark.parametrize(
    ("asked", "becomes", "said"),
    [
        ("Q6_K", "Q8_0", "256 does not divide 96 columns: Q6_K becomes INT8 in groups of 32"),
        ("W4A16", "Q4_0", "a scale for each 32 columns: the group is 32, not 128"),
    ],
)
def test_ends_get_the_grids_of_files_too(asked: str, becomes: str, said: str) -> None:
    recipe = Recipe.parse(
        {
            "steps": ["rtn"],
            "weights": GGUF_TYPES["Q4_0"].model_dump(),
            "overrides": {"embed_tokens": SCHEMES[asked].model_dump()},
        }
    )
    columns = 96 if asked == "Q6_K" else 128
    end = End("embed_tokens", "embed_tokens.weight", (40, columns), embeds=True, heads=False)
    grids = choose_grids({"layers.0.q": (64, 64)}, False, recipe, "llama.cpp", ends=[end])
    assert grids.ends["embed_tokens"] == GGUF_TYPES[becomes]
    assert said in grids.notes["embed_tokens"]


def test_refusals(tmp_path: Path) -> None:
    source = saved(tmp_path / "llama", "llama")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(OutputBusy):
        api.export(source, tmp_path / "there.gguf", to="gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        api.export(source, tmp_path / "m.bin", to="gguf")
    with pytest.raises(ConfigError, match="Q4_K_M"):
        api.export(source, tmp_path / "m.gguf", to="gguf:Q4_KM")
    for family, changes, why in (
        ("granite", {}, "granite"),
        ("qwen3-moe", {}, "norm_topk_prob"),
        ("gemma3", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, "full_attention"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ):
        directory = saved(tmp_path / f"{family}-{why}", family, **changes)
        with pytest.raises(UnsupportedModel, match=why):
            api.export(directory, tmp_path / "m.gguf", to="gguf")
        assert not (tmp_path / "m.gguf").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "llama", "llama")

    def full(directory: Path, bytes_needed: int) -> None:
        raise ResourceError("the disk is full.", where=str(directory))

    monkeypatch.setattr("pocketlm.models.gguf_write.require_room", full)
    with pytest.raises(ResourceError):
        api.export(source, tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    assert shards.PARTIAL == ".part"


def test_sentencepiece_by_scores() -> None:
    """Llama 2's way: the first merges have the highest scores, bytes stand for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "x y"]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("\u2581", "ab")],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("x y", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    keys = vocabulary(tokenizer, 12)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 4, 5, 5]
    scores = dict(zip(keys["ggml.tokens"], keys["ggml.scores"], strict=True))
    assert scores["ab"] == 0 > scores["\u2581ab"] == -1 > scores["a"]
    assert keys["ggml.add_space_prefix"] is True
    assert keys["ggml.add_bos_token"] is False
    with pytest.raises(UnsupportedModel, match="beyond the 9 rows"):
        vocabulary(tokenizer, 9)


def test_a_pre_tokenizer_without_a_name() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedModel, match="Whitespace"):
        vocabulary(tokenizer, 96)
