"""The kernel that searches integer grids against the search in PyTorch, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from pocketlm.core.spec import QuantSpec
from pocketlm.quant import grid
from pocketlm.quant.grid import Grid, multiples_tried, round_to_grid, searched_grid
from pocketlm.quant.grid_kernel import left_over, search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts a float off to bfloat16 where a GPU rounds it.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def weight_OI(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values_OI = torch.randn(rows, columns, generator=generator)
    values_OI[0, : columns // 2] = 0  # a group without weights
    return values_OI.to(DEVICE)


def squares(weight: torch.Tensor, found: Grid, spec: QuantSpec, weigh_I) -> torch.Tensor:
    """The weighted squared error of each group on a grid."""
    off_OI = round_to_grid(weight, found, spec).dequantize() - weight
    weighed_OI = off_OI.square() * (1.0 if weigh_I is None else weigh_I)
    return weighed_OI.view(*found.scale_OG.shape, -1).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 24), (8, None)])
def test_the_kernel_is_the_search(
    bits: int, group: int | None, dtype: torch.dtype, symmetric: bool, monkeypatch
) -> None:
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    weight, importance_I = weight_OI(7, 96), torch.rand(96, device=DEVICE) + 0.1
    monkeypatch.setattr(grid, "kernel_serves", lambda weight_OI, spec: False)
    for weigh_I in (None, importance_I):
        expected = searched_grid(weight, spec, dtype, weigh_I, steps=6)
        scale_OG, zero_OG = search(
            weight, spec, dtype, weigh_I, list(multiples_tried(spec, 0.5, 6))
        )
        # Two shrinks may be equally good but for the order of a sum; and a GPU joins a product and
        # a sum, so that scales of float32 may differ in their last place.
        same = torch.isclose(scale_OG, expected.scale_OG, rtol=1e-6, atol=0)
        if zero_OG is not None:
            assert expected.zero_OG is not None
            same &= zero_OG == expected.zero_OG
        assert float((~same).double().mean()) < 0.1
        found = Grid(scale_OG, zero_OG)
        ours_OG, theirs_OG = (squares(weight, one, spec, weigh_I) for one in (found, expected))
        torch.testing.assert_close(ours_OG, theirs_OG, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_left_over(symmetric: bool, monkeypatch) -> None:
    spec = QuantSpec(bits=4, group_size=32, symmetric=symmetric)
    weight, importance_I = weight_OI(5, 64), torch.rand(64, device=DEVICE) + 0.1
    scale_I = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    monkeypatch.setattr(grid, "kernel_serves", lambda weight_OI, spec: False)
    found = searched_grid(
        weight * scale_I, spec, torch.float16, importance_I / scale_I.square(), steps=5
    )
    rounded_OI = round_to_grid(weight * scale_I, found, spec).dequantize()
    multiples = list(multiples_tried(spec, 0.5, 5))
    left_OI = left_over(weight, spec, torch.float16, importance_I, multiples, scale_I)
    torch.testing.assert_close(left_OI.float(), rounded_OI / scale_I - weight, rtol=1e-2, atol=1e-3)
