"""Artifacts as transformers loads them: logits bit-equal to decoding by hand."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tests.unit.formats.artifacts import build_gpt2, build_llama, decoded_by_hand, write_artifact

import pocketlm.hf
from pocketlm.core.spec import QuantSpec

TOKENS = torch.arange(3, 27)[None] * 7 % 320


def load(path: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    with warnings.catch_warnings():  # the libraries' own deprecations are not ours
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def same_logits(first: transformers.PreTrainedModel, second: transformers.PreTrainedModel) -> bool:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.equal(first(TOKENS).logits, second(TOKENS).logits)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, group_size=32),
        QuantSpec(bits=4, group_size=None),
        QuantSpec(bits=8, group_size=16),
        QuantSpec(bits=3, group_size=32),
        QuantSpec(bits=2, group_size=32, symmetric=False),
        QuantSpec(bits=4, group_size=32, symmetric=False),
        QuantSpec(bits=5, group_size=None, symmetric=False),
        QuantSpec(bits=7, group_size=8),
    ],
    ids=lambda spec: f"{spec.bits}{'' if spec.symmetric else 'a'}-{spec.group_size}",
)
def test_compressed_tensors_by_transformers_alone(tmp_path: Path, spec: QuantSpec) -> None:
    model = build_llama()
    path, packed = write_artifact(tmp_path / "out", model, lambda name: spec)
    assert len(packed) == 14
    assert same_logits(load(path), decoded_by_hand(model, packed))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_scales_of_half_width(tmp_path: Path, stored: torch.dtype, loaded: torch.dtype) -> None:
    model = build_llama(stored)
    path, packed = write_artifact(tmp_path / "out", model, lambda name: QuantSpec(group_size=32))
    assert {weight.scale_OG.dtype for weight in packed.values()} == {stored}
    assert same_logits(load(path, loaded), decoded_by_hand(model, packed, loaded))


def test_mixed_grids_and_kept_linears(tmp_path: Path) -> None:
    def choose(name: str) -> QuantSpec | None:
        if name.endswith("down_proj"):
            return QuantSpec(bits=6, group_size=None)
        if name == "model.layers.1.self_attn.o_proj":
            return None
        return QuantSpec(bits=8 if "mlp" in name else 4, group_size=32)

    model = build_llama(tied=True)
    path, packed = write_artifact(tmp_path / "out", model, choose, max_shard_bytes=40_000)
    assert len(packed) == 13
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert same_logits(load(path), decoded_by_hand(model, packed))


def test_the_head_alone_may_be_named(tmp_path: Path) -> None:
    model = build_llama()
    grids = {"model.layers.0.mlp.up_proj": QuantSpec(group_size=32)}
    grids["model.layers.1.mlp.up_proj"] = QuantSpec(group_size=16)
    path, packed = write_artifact(tmp_path / "out", model, grids.get)
    assert len(packed) == 2
    assert same_logits(load(path), decoded_by_hand(model, packed))


@pytest.mark.parametrize("spec", [QuantSpec(group_size=32), QuantSpec(bits=3, symmetric=False)])
def test_conv1d_through_our_own_format(tmp_path: Path, spec: QuantSpec) -> None:
    model = build_gpt2()
    grid = spec.fit(64)
    path, packed = write_artifact(tmp_path / "out", model, lambda name: grid, "pocketlm")
    assert len(packed) == 8
    loaded = load(path)
    assert type(loaded.transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D
    assert same_logits(loaded, decoded_by_hand(model, packed))


def test_our_own_format_in_bfloat16(tmp_path: Path) -> None:
    model = build_gpt2()
    spec = QuantSpec(group_size=32)
    path, packed = write_artifact(tmp_path / "out", model, lambda name: spec, "pocketlm")
    loaded = load(path, torch.bfloat16)
    assert same_logits(loaded, decoded_by_hand(model, packed, torch.bfloat16))
    assert not pocketlm.hf.PocketlmQuantizer.is_serializable(loaded.hf_quantizer)


def test_without_our_quantizer_nothing_is_made_up(tmp_path: Path, monkeypatch) -> None:
    grid = QuantSpec(group_size=32)
    path, _ = write_artifact(tmp_path / "out", build_gpt2(), lambda name: grid, "pocketlm")
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "pocketlm")
    with pytest.raises(ValueError, match=r"`import pocketlm\.hf` before loading"):
        load(path)
