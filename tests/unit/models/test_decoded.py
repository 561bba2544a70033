"""Our own artifacts open as the model they were made from, with the weights that were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.formats.artifacts import build_llama, write_artifact
from tests.unit.models.test_families import streamed_logits, tokens
from torch import Tensor

from pocketlm.core.errors import UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats import compressed_tensors, pocketlm
from pocketlm.models import open_model
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.stream import SINGLE

SPEC = QuantSpec(bits=4, symmetric=True, group_size=8)


def rounded(weight_OI: Tensor) -> PackedInt:
    """Round to nearest, the plainest way."""
    groups = weight_OI.float().unflatten(1, (-1, 8))
    scale_OG = groups.abs().amax(-1) / 7
    codes = (groups / scale_OG[..., None]).round().clamp(-8, 7)
    return PackedInt(codes.flatten(1).to(torch.int8), scale_OG, None, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_artifact_equals_dequantized_model(
    family: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = saved(family)
    original = open_model(source)
    stored = load_file(source / SINGLE)
    plain = dict(stored)
    transposed = []
    for name in original.linear_shapes():
        weight = stored.pop(f"{name}.weight")
        conv1d = family == "gpt2"
        transposed += [name] if conv1d else []
        packed = rounded(weight.T if conv1d else weight)
        stored.update(compressed_tensors.encode(f"{name}.weight", packed))
        decoded = packed.dequantize()
        plain[f"{name}.weight"] = (decoded.T if conv1d else decoded).contiguous()
    specs = dict.fromkeys(original.linear_shapes(), SPEC)
    section = (
        pocketlm.config_section(specs, ["lm_head"], transposed)
        if transposed
        else compressed_tensors.config_section(specs, ["lm_head"])
    )
    artifact, dense = tmp_path / "artifact", tmp_path / "dense"
    config = json.loads((source / "config.json").read_text())
    for directory, weights in ((artifact, stored), (dense, plain)):
        directory.mkdir()
        save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    (dense / "config.json").write_text(json.dumps(config))
    (artifact / "config.json").write_text(json.dumps({**config, "quantization_config": section}))

    model, reference = open_model(artifact, allow_compressed=True), open_model(dense)
    assert model.linear_shapes() == original.linear_shapes()
    assert "quantization_config" not in model.config
    assert torch.equal(streamed_logits(model, tokens()), streamed_logits(reference, tokens()))
    first = next(iter(model.linear_shapes())) + ".weight"
    assert torch.equal(model.source.rows(first, 1, 3), plain[first][1:3])
    assert isinstance(model.source, DecodedSource)
    model.source.rounded_to = {first.removesuffix(".weight"): torch.bfloat16}
    weight = load_file(source / SINGLE)[first]
    half = rounded(weight.T if transposed else weight).dequantize(torch.bfloat16).float()
    half = half.T if transposed else half
    assert not torch.equal(half, plain[first])
    assert torch.equal(model.source.read(first), half)
    assert torch.equal(model.source.rows(first, 1, 3), half[1:3])
    model.source.rounded_to = {}
    chunks = b"".join(bytes(chunk) for chunk in model.source.chunks(first, 100))
    assert chunks == plain[first].view(torch.uint8).numpy().tobytes()
    with pytest.raises(UnsupportedModel, match="already quantized"):
        open_model(artifact)


@pytest.mark.parametrize(("form", "several"), [("compressed-tensors", True), ("gptq", False)])
def test_pieces_are_the_weight(form: str, several: bool, tmp_path: Path) -> None:
    """Rows come apart only where the layout stores each by itself; GPTQ packs several in a word."""
    spec = QuantSpec(bits=4, group_size=32)
    directory, packed = write_artifact(
        tmp_path / "a", build_llama(torch.float16), lambda module: spec, form
    )
    source = open_model(directory, allow_compressed=True).source
    assert isinstance(source, DecodedSource)
    for module, weight in packed.items():
        pieces = list(source.pieces(f"{module}.weight", 8 * 4 * weight.shape[1]))
        assert (len(pieces) > 1) == several
        assert torch.equal(torch.cat([p.dequantize() for p in pieces]), weight.dequantize())
