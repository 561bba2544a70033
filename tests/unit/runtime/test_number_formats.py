"""Floats and tables run tile by tile in the reference kernel; fast kernels leave them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.runtime.helpers import rounded, write_twins
from tests.unit.runtime.test_load import both_logits, llama, projections

from pocketlm.core.spec import SCHEMES, QuantSpec
from pocketlm.runtime.kernels import base
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.reference import Reference
from pocketlm.runtime.kernels.select import kernel_for
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.load import _mostly_int4, packed_summary

CPU = torch.device("cpu")
FLOATS = {name: spec for name, spec in SCHEMES.items() if spec.type != "int"}
FLOATS["FP8_GROUP"] = QuantSpec(type="float", bits=8, group_size=32)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("name", FLOATS)
def test_the_reference_equals_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 256 if FLOATS[name].scale == "k" else 192
    spec = FLOATS[name].fit(columns)
    weight = rounded(torch.randn(300, columns, generator=torch.Generator().manual_seed(1)), spec)
    grid, kernel = Grid.of(weight), Reference()
    truth_OI = weight.dequantize(torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        x_MI = torch.randn(5, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
        buffers = kernel.pack(weight, dtype, CPU)
        assert sum(b.numel() * b.element_size() for b in buffers.values()) == weight.stored_bits / 8
        whole_MO = kernel.matmul(x_MI, buffers, grid)
        truth_MO = x_MI.double() @ truth_OI.T
        assert (whole_MO.double() - truth_MO).norm() < tolerance * truth_MO.norm()
        with monkeypatch.context() as patch:  # tiles of seven rows, across those of the scales
            patch.setattr(base, "TILE_BYTES", 7 * columns * x_MI.element_size())
            tiles_MO = kernel.matmul_tiles(x_MI, buffers, grid)
        assert torch.allclose(tiles_MO.float(), whole_MO.float(), rtol=tolerance, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_kernels_say_that_they_take_integers(dtype: torch.dtype) -> None:
    weight = rounded(torch.randn(64, 128), FLOATS["NVFP4"])
    choice = kernel_for(Grid.of(weight), dtype)
    assert choice.is_fallback
    assert choice.refused
    assert set(choice.refused.values()) == {"takes integers only"}
    assert "NVFP4" in repr(PackedLinear(weight, dtype=dtype))


@pytest.mark.parametrize("name", ["NVFP4", "MXFP8", "FP8_BLOCK", "NF4_DQ"])
def test_artifacts_run_packed(tmp_path: Path, name: str) -> None:
    original = llama()
    specs = {module: FLOATS[name].fit(32) for module in projections(original)}
    packed, dense = write_twins(tmp_path, original, specs)
    assert not _mostly_int4(packed)
    model, found, truth = both_logits(packed, dense)
    assert packed_summary(model).linears == len(specs)
    assert packed_summary(model).kernels == {"reference": len(specs)}
    assert (found - truth).abs().max() < 2e-4 * truth.abs().max()
