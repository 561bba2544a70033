"""Every kind of checkpoint gives the same model: dtypes, shards, prefixes, memory, large tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.models.families import build
from tests.unit.models.test_families import streamed_logits, tokens
from transformers import AutoModelForCausalLM

from pocketlm.core.errors import SourceError
from pocketlm.models import ends, open_model
from pocketlm.models.stream import SINGLE


def expected_logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens()).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_compute_in_float32(
    saved: Callable[..., Path], dtype: torch.dtype
) -> None:
    directory = saved("llama", dtype)
    model = open_model(directory)
    assert model.dtype == dtype
    assert torch.equal(streamed_logits(model, tokens()), expected_logits(directory))
    with model.block(0) as block:
        linear = block.linears["model.layers.0.self_attn.q_proj"]
        assert linear.dtype == dtype
        assert torch.equal(linear.weight_OI(), model.source.read(linear.tensor_name).float())


def test_bfloat16_compute_and_exact_weights(saved: Callable[..., Path]) -> None:
    directory = saved("gemma3")
    model = open_model(directory, compute_dtype=torch.bfloat16)
    assert torch.equal(streamed_logits(model, tokens()), expected_logits(directory, torch.bfloat16))
    with model.block(0) as block:
        for linear in block.linears.values():
            assert torch.equal(linear.weight_OI(), model.source.read(linear.tensor_name))


def test_shards(saved: Callable[..., Path]) -> None:
    directory = saved("qwen3-moe", shard="20KB")
    assert not (directory / SINGLE).exists()
    got = streamed_logits(open_model(directory), tokens())
    torch.testing.assert_close(got, expected_logits(directory), rtol=1e-5, atol=1e-5)


def test_conv1d_is_seen_as_a_linear(saved: Callable[..., Path]) -> None:
    model = open_model(saved("gpt2"))
    with model.block(0) as block:
        linear = block.linears["transformer.h.0.mlp.c_fc"]
        assert linear.stored_transposed
        assert linear.weight_OI().shape == (linear.out_features, linear.in_features) == (48, 32)
        assert torch.equal(linear.weight_OI().T, model.source.read(linear.tensor_name))
        linear.set_weight_OI(linear.weight_OI() * 2)
        assert torch.equal(block.module.mlp.c_fc.weight, model.source.read(linear.tensor_name) * 2)


def test_checkpoint_without_the_base_prefix(saved: Callable[..., Path]) -> None:
    directory = saved("gpt2")
    expected = expected_logits(directory)
    weights = load_file(directory / SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, directory / SINGLE, metadata={"format": "pt"})
    model = open_model(directory)
    assert model.block_paths[0] == "h.0"
    assert "h.0.attn.c_attn" in model.linear_shapes()
    assert torch.equal(streamed_logits(model, tokens()), expected)


def test_extra_tensors_are_listed(saved: Callable[..., Path]) -> None:
    directory = saved("llama")
    weights = load_file(directory / SINGLE)
    weights["model.layers.3.eh_proj.weight"] = torch.ones(4, 4)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    assert open_model(directory).extras == ("model.layers.3.eh_proj.weight",)


def test_missing_parameter(saved: Callable[..., Path]) -> None:
    directory = saved("llama")
    weights = load_file(directory / SINGLE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(directory)


def test_wrong_shape(saved: Callable[..., Path]) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(SourceError, match="the model wants"):
        open_model(directory)


def test_tied_checkpoint_with_both_tensors(saved: Callable[..., Path]) -> None:
    directory = saved("qwen3")
    weights = load_file(directory / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    assert open_model(directory).tied
    weights["lm_head.weight"][5] += 1
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    model = open_model(directory)
    assert not model.tied
    assert torch.equal(streamed_logits(model, tokens()), expected_logits(directory))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "opt"])
def test_model_in_memory(family: str, saved: Callable[..., Path]) -> None:
    saved_model = open_model(saved(family))
    memory = build(family)
    model = open_model(memory)
    assert model.linear_shapes() == saved_model.linear_shapes()
    assert set(model.source.infos()) == set(saved_model.source.infos())
    assert torch.equal(streamed_logits(model, tokens()), streamed_logits(saved_model, tokens()))
    assert not any(parameter.is_meta for parameter in memory.parameters())
    assert model.config["architectures"] == saved_model.config["architectures"]


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "gemma3", "opt-350m-style"])
def test_large_tables_stay_on_disk(
    family: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(family)
    monkeypatch.setattr(ends, "KEEP_BYTES_CPU", 5000)
    monkeypatch.setattr(ends, "CHUNK_BYTES", 7 * 32 * 4)
    model = open_model(directory)
    got = streamed_logits(model, tokens())
    torch.testing.assert_close(got, expected_logits(directory), rtol=1e-5, atol=1e-5)
    assert model.skeleton.model.get_input_embeddings().weight.is_meta


def test_blocks_leave_no_weights_behind(saved: Callable[..., Path]) -> None:
    model = open_model(saved("llama"))
    with model.block(0) as block:
        first = block.linears["model.layers.0.mlp.up_proj"].module.weight.data_ptr()
    assert all(parameter.is_meta for parameter in model.skeleton.blocks[0].parameters())
    with model.block(1) as block:
        assert block.linears["model.layers.1.mlp.up_proj"].module.weight.data_ptr() == first


def test_calls_of_many_batches_share_tensors(saved: Callable[..., Path]) -> None:
    model = open_model(saved("mistral-window"))
    (_, first), (_, second) = model.begin(tokens()), model.begin(tokens().flip(0))
    one, other = first.blocks[2].kwargs, second.blocks[2].kwargs
    assert one["attention_mask"] is other["attention_mask"]
    assert one["position_embeddings"][0] is first.blocks[0].kwargs["position_embeddings"][0]
    assert one["position_embeddings"][0] is other["position_embeddings"][0]
