"""AWQ, SmoothQuant, correction and HQQ against their formulas, on inputs with large columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import AbsMax, Drift, Hessian
from pocketlm.quant.awq import Awq
from pocketlm.quant.clip import Clip
from pocketlm.quant.correct import Correct
from pocketlm.quant.grid import minmax_grid, round_to_grid
from pocketlm.quant.hqq import Hqq, shrink
from pocketlm.quant.rtn import Rtn
from pocketlm.quant.smoothquant import Smoothquant

ROWS, COLUMNS, TOKENS = 24, 128, 700


@pytest.fixture
def inputs_TI() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(TOKENS, COLUMNS, generator=generator)
    x_TI[:, ::17] *= 30  # a few massive columns, as in real models
    return x_TI


@pytest.fixture
def states() -> list[LinearState]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2)]
    spec = QuantSpec(bits=3, group_size=64)
    return [LinearState(f"linear{i}", w, spec, torch.float16) for i, w in enumerate(weights)]


def gathered(stat, *batches: Tensor):
    stat.add(*batches)
    return Statistics(stat)


def rounded_error(states: list[LinearState], scale_I: Tensor, hessian_II: Tensor) -> float:
    total = 0.0
    for state in states:
        scaled_OI = state.reference_OI * scale_I
        grid = minmax_grid(scaled_OI, state.spec, state.scale_dtype)
        back_OI = round_to_grid(scaled_OI, grid, state.spec).dequantize() / scale_I
        total += relative_error(state.reference_OI, back_OI, hessian_II)
    return total


def test_awq_lowers_the_output_error(inputs_TI: Tensor, states: list[LinearState]) -> None:
    stats = gathered(Hessian(COLUMNS), inputs_TI)
    scale_I = Awq(clip=False).scale(states, stats)
    assert scale_I is not None
    assert bool((scale_I[::17].mean() > scale_I.median()).all())  # massive columns are scaled up
    hessian_II = stats[Hessian].matrix_II()
    plain = rounded_error(states, torch.ones(COLUMNS), hessian_II)
    assert rounded_error(states, scale_I, hessian_II) < 0.6 * plain


def test_awq_takes_the_best_of_both_families(inputs_TI: Tensor) -> None:
    """|x|^a, and (|x| / |w|)^a with |w| over its group's largest, as arXiv:2306.00978 and its code
    have them; every trial is rounded here once more.
    """
    stats, steps, winners = gathered(Hessian(COLUMNS), inputs_TI), 4, set()
    size_I = inputs_TI.square().mean(0).sqrt()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight_OI = torch.randn(ROWS, COLUMNS, generator=generator)
        if seed % 2:  # columns of very different size
            weight_OI *= torch.rand(COLUMNS, generator=generator)
        state = LinearState("x", weight_OI, QuantSpec(bits=3, group_size=64), torch.float16)
        tiles_OGn = weight_OI.abs().view(ROWS, 2, 64)
        share_I = (tiles_OGn / tiles_OGn.amax(-1, keepdim=True)).mean(0).flatten()
        trials = [
            base_I ** (a / steps)
            for a in range(1, steps + 1)
            for base_I in (size_I, size_I / share_I)
        ]
        trials = [t_I / (t_I.max() * t_I.min()).sqrt() for t_I in trials]
        hessian_II = stats[Hessian].matrix_II()
        errors = [rounded_error([state], t_I, hessian_II) for t_I in trials]
        best = min(range(len(trials)), key=errors.__getitem__)
        found_I = Awq(clip=False, steps=steps).scale([state], stats)
        assert found_I is not None
        assert torch.allclose(found_I, trials[best], rtol=1e-4)
        winners.add(best % 2)
    assert winners == {0, 1}


def test_awq_leaves_alone_what_it_cannot_improve(states: list[LinearState]) -> None:
    assert Awq().scale(states, Statistics(Hessian(COLUMNS))) is None  # no token
    level = states[0].reference_OI.sign()  # any grid holds it exactly
    exact = [LinearState("x", level, states[0].spec, torch.float16)]
    stats = gathered(Hessian(COLUMNS), torch.ones(300, COLUMNS))
    assert Awq(clip=False, steps=3).scale(exact, stats) is None


def test_awq_survives_dead_columns(inputs_TI: Tensor, states: list[LinearState]) -> None:
    inputs_TI[:, 5:9] = 0
    scale_I = Awq(steps=4).scale(states, gathered(Hessian(COLUMNS), inputs_TI))
    assert scale_I is not None
    assert bool(torch.isfinite(scale_I).all())
    assert bool((scale_I > 0).all())


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothquant_is_its_formula(
    inputs_TI: Tensor, states: list[LinearState], strength: float
) -> None:
    scale_I = Smoothquant(strength=strength).scale(states, gathered(AbsMax(COLUMNS), inputs_TI))
    weights_I = torch.cat([state.reference_OI for state in states]).abs().amax(0)
    expected_I = inputs_TI.abs().amax(0) ** strength / weights_I ** (1 - strength)
    assert scale_I is not None
    assert torch.allclose(scale_I, expected_I / (expected_I.max() * expected_I.min()).sqrt())


def test_correction_is_the_least_squares_target(
    inputs_TI: Tensor, states: list[LinearState]
) -> None:
    """W' minimises |W X0 - W' X|² + I / T · |(W' - W) diag(XXᵀ)^½|²: few tokens count less."""
    generator = torch.Generator().manual_seed(2)
    changed_TI = inputs_TI + 0.1 * torch.randn(TOKENS, COLUMNS, generator=generator) @ torch.randn(
        COLUMNS, COLUMNS, generator=generator
    )
    hessian, drift = Hessian(COLUMNS), Drift(COLUMNS)
    hessian.add(changed_TI)
    drift.add(changed_TI, inputs_TI)
    state = Correct(strength=1.0, damping=1e-9).compress(states[0], Statistics(hessian, drift))
    prior_II = torch.diag((changed_TI.square().sum(0) * COLUMNS / TOKENS).sqrt())
    rows = torch.cat([changed_TI, prior_II]).double()
    wanted_TO = torch.cat([inputs_TI, prior_II]).double() @ states[0].reference_OI.T.double()
    expected_IO = torch.linalg.lstsq(rows, wanted_TO).solution
    assert torch.allclose(state.reference_OI.double(), expected_IO.T, atol=2e-3)
    half = Correct(strength=0.5, damping=1e-9).compress(states[0], Statistics(hessian, drift))
    middle_OI = (states[0].reference_OI + state.reference_OI) / 2
    assert torch.allclose(half.reference_OI, middle_OI, atol=1e-4)


def test_correction_without_pairs_is_noted(states: list[LinearState], inputs_TI: Tensor) -> None:
    hessian = Hessian(COLUMNS)
    hessian.add(inputs_TI)
    state = Correct().compress(states[0], Statistics(hessian, Drift(COLUMNS)))
    assert torch.equal(state.reference_OI, states[0].reference_OI)
    assert [note.kind for note in state.notes] == ["correct"]


def test_inputs_of_zeros_correct_nothing(states: list[LinearState], inputs_TI: Tensor) -> None:
    hessian, drift = Hessian(COLUMNS), Drift(COLUMNS)
    hessian.add(torch.zeros_like(inputs_TI))
    drift.add(torch.zeros_like(inputs_TI), inputs_TI)
    state = Correct().compress(states[0], Statistics(hessian, drift))
    assert torch.equal(state.reference_OI, states[0].reference_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_the_norm_it_minimises(states: list[LinearState], symmetric: bool) -> None:
    spec = QuantSpec(bits=3, group_size=64, symmetric=symmetric)
    state = LinearState("x", states[0].reference_OI, spec, torch.float16)
    none = Statistics()

    def norm(weight_OI: Tensor) -> float:
        return float((weight_OI - state.reference_OI).abs().pow(0.7).sum())

    found, plain = Hqq().compress(state, none).current, Rtn().compress(state, none).current
    assert found is not None
    assert plain is not None
    assert norm(found.dequantize()) < 0.99 * norm(plain.dequantize())


def test_shrink_is_the_proximal_step() -> None:
    """At |x| = 4, p = 1 and b = 2: one half less; below the threshold: nothing."""
    x = torch.tensor([-4.0, 0.25, 0.0, 4.0])
    assert torch.allclose(shrink(x, 2.0, 1.0), torch.tensor([-3.5, 0.0, 0.0, 3.5]))


def test_clipping_after_awq_still_helps(inputs_TI: Tensor, states: list[LinearState]) -> None:
    stats = gathered(Hessian(COLUMNS), inputs_TI)
    hessian_II = stats[Hessian].matrix_II()
    clipped = Clip().compress(states[0], stats).current
    plain = Rtn().compress(states[0], stats).current
    assert clipped is not None
    assert plain is not None
    errors = [
        relative_error(states[0].reference_OI, q.dequantize(), hessian_II) for q in (clipped, plain)
    ]
    assert errors[0] < errors[1]
