"""GPTQ: the blocked sweep equals the paper's column-by-column elimination."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.linalg import inverse_factor
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import PackedInt
from pocketlm.quant.gptq import Gptq, column_order, sweep
from pocketlm.quant.grid import Grid, grouped, minmax_grid, packed
from pocketlm.quant.rtn import Rtn

ROWS, COLUMNS, GROUP = 12, 96, 32


@pytest.fixture
def hessian() -> Hessian:
    generator = torch.Generator().manual_seed(1)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x_TI = torch.randn(500, COLUMNS, generator=generator) @ mixing_II
    stat = Hessian(COLUMNS)
    stat.add(x_TI)
    return stat


@pytest.fixture
def weight_OI() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))


def eliminated(
    weight_OI: Tensor, damped_II: Tensor, grid: Grid, spec: QuantSpec, order_I: Tensor
) -> Tensor:
    """Optimal brain quantization, literally: each column updates the inverse."""
    rest_OI = weight_OI.double().clone()
    inverse_II = torch.linalg.inv(damped_II.double())
    codes_OI = torch.empty_like(rest_OI)
    for i in order_I.tolist():
        scale_O = grid.scale_OG[:, i // GROUP].double()
        zero_O = torch.zeros(ROWS, dtype=torch.float64)
        if grid.zero_OG is not None:
            zero_O = grid.zero_OG[:, i // GROUP].double()
        code_O = torch.round(rest_OI[:, i] / scale_O + zero_O).clamp(spec.code_min, spec.code_max)
        codes_OI[:, i] = code_O
        error_O = (rest_OI[:, i] - (code_O - zero_O) * scale_O) / inverse_II[i, i]
        rest_OI -= error_O[:, None] * inverse_II[i][None, :]
        inverse_II = (
            inverse_II - inverse_II[:, i : i + 1] @ inverse_II[i : i + 1] / inverse_II[i, i]
        )
    return codes_OI.to(torch.int8)


@pytest.mark.parametrize("order", ["stored", "activation"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_columns", [1, 7, 32, 128])
def test_blocked_sweep_is_the_elimination(
    weight_OI: Tensor, hessian: Hessian, order: str, symmetric: bool, block_columns: int
) -> None:
    spec = QuantSpec(bits=4, symmetric=symmetric, group_size=GROUP)
    grid = minmax_grid(weight_OI, spec, torch.float32)
    order_I = column_order(hessian, order)
    factor = hessian.inverse_factor(0.01, order_I)
    level_OI = sweep(weight_OI, factor, grid, spec, order_I, block_columns)
    codes_OI = packed(level_OI, grid, spec).codes_OI
    damped_II = hessian.matrix_II().clone()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    plain_I = torch.arange(COLUMNS) if order_I is None else order_I
    expected_OI = eliminated(weight_OI, damped_II, grid, spec, plain_I)
    # float32 against float64: a weight on the edge of two codes may fall either way.
    assert (codes_OI != expected_OI).float().mean() < 0.01


def test_grid_of_an_earlier_step_is_kept(weight_OI: Tensor, hessian: Hessian) -> None:
    spec = QuantSpec(bits=3, group_size=GROUP)
    scale_OG = torch.full((ROWS, COLUMNS // GROUP), 0.3, dtype=torch.float16)
    codes_OI = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
    state = LinearState("x", weight_OI, spec, torch.float16, PackedInt(codes_OI, scale_OG, None, 3))
    after = Gptq().compress(state, Statistics(hessian)).current
    assert isinstance(after, PackedInt)
    assert torch.equal(after.scale_OG, scale_OG)


def test_beats_rounding_to_nearest(weight_OI: Tensor, hessian: Hessian) -> None:
    state = LinearState("x", weight_OI, QuantSpec(bits=3, group_size=GROUP), torch.float16)
    hessian_II = hessian.matrix_II()
    errors = [
        relative_error(
            weight_OI, step.compress(state, Statistics(hessian)).current.dequantize(), hessian_II
        )
        for step in (Gptq(), Rtn())
    ]
    assert errors[0] < 0.6 * errors[1]


def test_no_token_is_said(weight_OI: Tensor) -> None:
    state = LinearState("x", weight_OI, QuantSpec(bits=4, group_size=GROUP), torch.float16)
    after = Gptq().compress(state, Statistics(Hessian(COLUMNS)))
    assert [note.kind for note in after.notes] == ["no_tokens"]
    assert torch.equal(after.current.codes_OI, Rtn().compress(state, Statistics()).current.codes_OI)


def test_scales_follow_their_columns() -> None:
    """With activation order a column keeps the scale of the group in which it is stored."""
    spec = QuantSpec(bits=4, group_size=GROUP)
    weight_OI = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight_OI[:, GROUP:] *= 100
    stat = Hessian(COLUMNS)
    stat.add(torch.randn(400, COLUMNS, generator=torch.Generator().manual_seed(3)))
    grid = minmax_grid(weight_OI, spec, torch.float32)
    order_I = column_order(stat, "activation")
    level_OI = sweep(
        weight_OI, inverse_factor(stat.matrix_II()[order_I][:, order_I], 0.01), grid, spec, order_I
    )
    decoded_OI = packed(level_OI, grid, spec).dequantize()
    step_OG = grid.scale_OG.abs()
    off_OGi = grouped((decoded_OI - weight_OI).abs(), spec) / step_OG[:, :, None]
    assert off_OGi.median() < 1
