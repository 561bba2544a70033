"""Grids: they reach every weight, use all codes, and the search never loses to min-max."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.core.spec import QuantSpec
from pocketlm.quant import grid as grids
from pocketlm.quant.grid import minmax_grid, round_to_grid, searched_grid


def weight(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_within_a_step(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=32)
    weight_OI = weight(bits)
    grid = minmax_grid(weight_OI, spec, torch.float32)
    decoded_OI = round_to_grid(weight_OI, grid, spec).dequantize()
    step_OI = grid.scale_OG.abs().repeat_interleave(32, 1)
    # A symmetric grid is one step short on the side of the smaller extreme.
    assert ((decoded_OI - weight_OI).abs() <= step_OI * (1.0 if symmetric else 0.501)).all()


def test_symmetric_grid_uses_the_code_without_a_twin() -> None:
    for sign in (1.0, -1.0):
        weight_OI = torch.linspace(-0.9, 1.0, 32)[None] * sign
        spec = QuantSpec(bits=4, group_size=32)
        packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.float32), spec)
        assert packed.codes_OI.min() == -8
        assert torch.sign(packed.scale_OG).item() == -sign


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans(), st.sampled_from([8, 16, 64, None]))
def test_search_never_loses(seed: int, bits: int, symmetric: bool, group: int | None) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=group)
    weight_OI = weight(seed)
    importance_I = torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.01
    errors = [
        (importance_I * (round_to_grid(weight_OI, g, spec).dequantize() - weight_OI).square()).sum()
        for g in (
            searched_grid(weight_OI, spec, torch.float16, importance_I),
            minmax_grid(weight_OI, spec, torch.float16),
        )
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_search_does_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(bits=3, group_size=16)
    whole = searched_grid(weight(4), spec, torch.float16)
    monkeypatch.setattr(grids, "ROWS_AT_ONCE_BYTES", 1)
    assert torch.equal(searched_grid(weight(4), spec, torch.float16).scale_OG, whole.scale_OG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_and_tiny_groups_stay_finite(dtype: torch.dtype) -> None:
    weight_OI = torch.zeros(3, 64)
    weight_OI[1] = 1e-9
    weight_OI[2] = 0.5
    for symmetric in (True, False):
        spec = QuantSpec(bits=4, symmetric=symmetric, group_size=32)
        decoded_OI = round_to_grid(
            weight_OI, searched_grid(weight_OI, spec, dtype), spec
        ).dequantize()
        assert torch.isfinite(decoded_OI).all()
        assert (decoded_OI[:2].abs() < 1e-6).all()
        assert torch.allclose(decoded_OI[2], weight_OI[2], rtol=0.01)
