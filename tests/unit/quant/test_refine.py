"""Refinement lowers the output error, and reaches what brute force finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import PackedInt
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.refine import Refine, renewed_codes, renewed_scales
from pocketlm.quant.rtn import Rtn


def hessian(columns: int, seed: int = 0) -> Hessian:
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(columns, columns, generator=generator)
    stat = Hessian(columns)
    stat.add(torch.randn(8 * columns, columns, generator=generator) @ mixing_II)
    return stat


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", [Rtn(), Gptq()])
def test_error_falls(symmetric: bool, first: Rtn | Gptq) -> None:
    weight_OI = torch.randn(10, 96, generator=torch.Generator().manual_seed(5))
    stat = hessian(96)
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=32)
    state = LinearState("x", weight_OI, spec, torch.float16)
    before = first.compress(state, Statistics(stat))
    after = Refine(rounds=2).compress(before, Statistics(stat))
    errors = [
        relative_error(weight_OI, s.current.dequantize(), stat.matrix_II()) for s in (before, after)
    ]
    assert errors[1] < 0.98 * errors[0]


def test_scales_solve_the_least_squares_problem() -> None:
    weight_OI = torch.randn(5, 64, generator=torch.Generator().manual_seed(6))
    stat = hessian(64, 2)
    spec = QuantSpec(bits=3, group_size=16)
    state = LinearState("x", weight_OI, spec, torch.float32)
    packed = Rtn().compress(state, Statistics()).current
    new = renewed_scales(weight_OI, packed, stat.matrix_II(), spec)
    lower_II = torch.linalg.cholesky(stat.matrix_II().double())
    for row in range(5):
        codes_GI = torch.block_diag(*packed.codes_OI[row].view(4, 16).double())
        best_G = torch.linalg.lstsq(
            (codes_GI @ lower_II).T, (weight_OI[row].double() @ lower_II)[:, None]
        )
        assert torch.allclose(new.scale_OG[row].double(), best_G.solution[:, 0], rtol=2e-3)


def test_codes_reach_a_minimum_that_no_single_code_improves() -> None:
    weight_OI = torch.randn(2, 6, generator=torch.Generator().manual_seed(7))
    hessian_II = hessian(6, 3).matrix_II()
    spec = QuantSpec(bits=2, group_size=None)
    scale_OG = torch.full((2, 1), 0.6)
    packed = PackedInt(torch.zeros(2, 6, dtype=torch.int8), scale_OG, None, 2)
    for _ in range(20):
        packed = renewed_codes(weight_OI, packed, hessian_II, spec)

    def error(codes_I: torch.Tensor, row: int) -> float:
        lost_I = weight_OI[row] - codes_I * 0.6
        return float(lost_I @ hessian_II @ lost_I)

    for row in range(2):
        reached = error(packed.codes_OI[row].float(), row)
        for i, code in itertools.product(range(6), range(-2, 2)):
            trial_I = packed.codes_OI[row].float().clone()
            trial_I[i] = code
            assert error(trial_I, row) >= reached - 1e-4


def test_needs_a_quantized_weight() -> None:
    state = LinearState("x", torch.zeros(2, 32), QuantSpec(group_size=32), torch.float16)
    with pytest.raises(UnsupportedLayer, match="after a quantizing step"):
        Refine().compress(state, Statistics(hessian(32)))


def test_all_zero_codes_keep_their_scale() -> None:
    weight_OI = torch.zeros(2, 32)
    packed = PackedInt(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), None, 4)
    new = renewed_scales(weight_OI, packed, hessian(32).matrix_II(), QuantSpec(group_size=None))
    assert torch.equal(new.scale_OG, packed.scale_OG)
