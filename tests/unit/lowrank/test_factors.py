"""The factors of each method against what its formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.core.factored import LowRank, Sum, best_left
from pocketlm.core.linalg import truncated_svd
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import AbsMean, Hessian
from pocketlm.core.tensors import Dense
from pocketlm.lowrank.asvd import Asvd
from pocketlm.lowrank.caldera import Caldera
from pocketlm.lowrank.factor import Whitening
from pocketlm.lowrank.laser import Laser
from pocketlm.lowrank.losparse import Losparse
from pocketlm.lowrank.lqer import Lorc, Lqer
from pocketlm.lowrank.svd import Svd
from pocketlm.lowrank.svd_llm import SvdLlm
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.rtn import Rtn

ROWS, COLUMNS, TOKENS = 24, 32, 400
NAME = "model.layers.3.mlp.up_proj"


def state_of(rows: int = ROWS, columns: int = COLUMNS, bits: int = 4) -> LinearState:
    draw = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(rows, columns, generator=draw)
    spec = QuantSpec(bits=bits, group_size=None)
    return LinearState(NAME, weight_OI, spec, torch.float32)


def inputs_of(columns: int = COLUMNS) -> Tensor:
    """Correlated inputs of very different size."""
    draw = torch.Generator().manual_seed(2)
    mixing_II = torch.randn(columns, columns, generator=draw)
    return torch.randn(TOKENS, columns, generator=draw) @ mixing_II * torch.logspace(-1, 1, columns)


def stats_of(x_TI: Tensor) -> Statistics:
    hessian, mean = Hessian(x_TI.shape[1]), AbsMean(x_TI.shape[1])
    hessian.add(x_TI)
    mean.add(x_TI)
    return Statistics(hessian, mean)


def lost(state: LinearState, weight_OI: Tensor, x_TI: Tensor) -> float:
    return float(((state.reference_OI - weight_OI) @ x_TI.T).double().square().sum())


def result_of(step, state: LinearState, stats: Statistics) -> Tensor:
    after = step.compress(state, stats)
    assert after.current is not None
    return after.current.dequantize()


FACTORISING = [Svd, Asvd, SvdLlm]


@pytest.mark.parametrize("method", FACTORISING)
def test_full_rank_is_exact(method) -> None:
    state, stats = state_of(), stats_of(inputs_of())
    weight_OI = result_of(method(rank=ROWS), state, stats)
    assert torch.allclose(weight_OI, state.reference_OI, atol=1e-3)


@pytest.mark.parametrize("method", FACTORISING)
def test_error_falls_with_the_rank(method) -> None:
    state, x_TI = state_of(), inputs_of()
    stats = stats_of(x_TI)
    errors = [lost(state, result_of(method(rank=r), state, stats), x_TI) for r in (1, 4, 12, 20)]
    if method is SvdLlm:
        assert errors == sorted(errors, reverse=True)
    weights = [
        float((state.reference_OI - result_of(method(rank=r), state, stats)).square().sum())
        for r in (1, 4, 12, 20)
    ]
    if method is Svd:
        assert weights == sorted(weights, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_svd_llm_loses_what_the_dropped_singular_values_say() -> None:
    """Theorem 3.2 and corollary 3.3 of arXiv:2403.07378."""
    state, x_TI = state_of(), inputs_of()
    stats = stats_of(x_TI)
    factor = stats[Hessian].inverse_factor(1e-4, None, 0.0)
    values_R = torch.linalg.svdvals(Whitening(factor.upper_II).weigh(state.reference_OI).double())
    for rank in (2, 8, 16):
        weight_OI = result_of(SvdLlm(rank=rank), state, stats)
        predicted = float(values_R[rank:].square().sum())
        damped_II = stats[Hessian].shrunk_II()
        damped_II.diagonal().add_(1e-4 * damped_II.diagonal().mean())
        difference_OI = state.reference_OI - weight_OI
        measured = float(((difference_OI @ damped_II) * difference_OI).sum())
        assert measured == pytest.approx(predicted, rel=1e-3)


def test_svd_llm_is_the_best_for_the_inputs() -> None:
    state, x_TI = state_of(), inputs_of()
    stats = stats_of(x_TI)
    errors = {
        step: lost(state, result_of(step(rank=8), state, stats), x_TI) for step in FACTORISING
    }
    assert errors[SvdLlm] < errors[Asvd] < errors[Svd]


def test_svd_llm_needs_no_update_of_the_left_factor() -> None:
    """Its closed-form update for the inputs that whitened it finds what is there already."""
    state, stats = state_of(), stats_of(inputs_of())
    current = SvdLlm(rank=8, damping=1e-6).compress(state, stats).current
    assert isinstance(current, LowRank)
    right_RI = current.right.dequantize()
    shrunk = Hessian(COLUMNS)
    shrunk.tokens = TOKENS
    shrunk._sum_II = stats[Hessian].shrunk_II() * TOKENS / 2
    updated_OR = best_left(state.reference_OI, right_RI, shrunk, damping=1e-6)
    assert torch.allclose(updated_OR @ right_RI, current.dequantize(), atol=2e-3)


def test_asvd_without_alpha_is_svd() -> None:
    state, stats = state_of(), stats_of(inputs_of())
    plain_OI = result_of(Svd(rank=5), state, stats)
    assert torch.allclose(result_of(Asvd(rank=5, alpha=0), state, stats), plain_OI, atol=1e-5)


@pytest.mark.parametrize("method", [*FACTORISING, Losparse])
def test_the_order_of_the_inputs_does_not_matter(method) -> None:
    state, x_TI = state_of(), inputs_of()
    order_I = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))
    mixed = LinearState(NAME, state.reference_OI[:, order_I], state.asked, torch.float32)
    step = method(rank=6)
    weight_OI = result_of(step, state, stats_of(x_TI))
    mixed_OI = result_of(step, mixed, stats_of(x_TI[:, order_I]))
    assert torch.allclose(mixed_OI, weight_OI[:, order_I], atol=2e-3)


def test_ratio_removes_at_least_its_share_of_the_parameters() -> None:
    for ratio in (0.1, 0.2, 0.5, 0.9):
        rank = Svd(ratio=ratio, multiple_of=1).rank_of(NAME, (ROWS, COLUMNS))
        assert rank is not None
        kept = rank * (ROWS + COLUMNS)
        assert kept <= (1 - ratio) * ROWS * COLUMNS < kept + ROWS + COLUMNS


def test_ranks_are_rounded_down_to_a_multiple_that_they_reach() -> None:
    shape = (ROWS, COLUMNS)
    found = [Svd(ratio=0.2, multiple_of=m).rank_of(NAME, shape) for m in (1, 4, 8, 32)]
    assert found == [10, 8, 8, 10]
    assert Svd(ratio=0.2).rank_of(NAME, shape) == 8


def test_ratio_zero_changes_nothing() -> None:
    state, stats = state_of(), stats_of(inputs_of())
    current = Svd(ratio=0).compress(state, stats).current
    assert isinstance(current, Dense)
    assert torch.equal(current.dequantize(), state.reference_OI)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0}, {"ratio": -0.1}, {"rank": 0}, {"rank": 4, "ratio": 0.2},
        {"ranks": {"up_proj": -1}}, {"rank": 4, "allocation": "energy"}, {"rnk": 3},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"option|unknown|contradict|shares"):
        Svd.parse(options, where="recipe step 'svd'")


def test_a_linear_too_small_for_the_ratio_is_named() -> None:
    with pytest.raises(ConfigError, match="do not fit") as caught:
        Svd(ratio=0.99).rank_of(NAME, (8, 8))
    assert NAME in str(caught.value)


def test_laser_takes_chosen_layers_only() -> None:
    step = Laser(layers="2-3,7", keep=0.25)
    assert step.rank_of("model.layers.3.mlp.up_proj", (64, 32)) == 8
    assert step.rank_of("model.layers.3.self_attn.q_proj", (64, 32)) is None
    assert step.rank_of("model.layers.4.mlp.up_proj", (64, 32)) is None
    with pytest.raises(ConfigError, match="no list of layers"):
        Laser.parse({"layers": "late"})


@pytest.mark.parametrize("scaling", ["none", "mean", "whitening"])
def test_lqer_repairs_what_rounding_lost(scaling: str) -> None:
    state, x_TI = state_of(bits=3), inputs_of()
    stats = stats_of(x_TI)
    rounded = Rtn().compress(state, stats)
    assert rounded.current is not None
    repaired = Lqer(rank=8, scaling=scaling).compress(rounded, stats)
    assert isinstance(repaired.current, Sum)
    before, after = rounded.current.dequantize(), repaired.current.dequantize()
    assert lost(state, after, x_TI) < lost(state, before, x_TI)
    whole = Lqer(rank=ROWS, scaling=scaling, bits=None).compress(rounded, stats)
    assert torch.allclose(whole.current.dequantize(), state.reference_OI, atol=1e-3)


def test_whitening_repairs_more_than_means_and_those_more_than_nothing() -> None:
    state, x_TI = state_of(bits=3), inputs_of()
    stats = stats_of(x_TI)
    rounded = Rtn().compress(state, stats)
    errors = [
        lost(state, result_of(Lqer(rank=8, scaling=scaling), rounded, stats), x_TI)
        for scaling in ("whitening", "mean", "none")
    ]
    assert errors == sorted(errors)
    lorc = lost(state, result_of(Lorc(rank=8), rounded, Statistics()), x_TI)
    assert lorc == pytest.approx(errors[-1])


@pytest.mark.parametrize("method", [Lqer, Caldera])
def test_repairs_need_something_to_repair(method) -> None:
    with pytest.raises(ConfigError, match="no step before it"):
        method(rank=4).compress(state_of(), stats_of(inputs_of()))


def test_calderas_turns_beat_rounding_the_best_factors() -> None:
    state, x_TI = state_of(bits=2), inputs_of()
    stats = stats_of(x_TI)
    coarse = Gptq().compress(state, stats)
    once = lost(state, result_of(Lqer(rank=8, bits=3), coarse, stats), x_TI)
    turns = lost(state, result_of(Caldera(rank=8, bits=3), coarse, stats), x_TI)
    assert turns < once


def test_losparse_keeps_exactly_what_it_says_and_beats_factors_of_its_size() -> None:
    state, x_TI = state_of(48, 64), inputs_of(64)
    loud_OI = state.reference_OI.clone()
    loud_OI[torch.arange(48), torch.arange(48)] *= 12  # what low rank cannot hold
    state = LinearState(NAME, loud_OI, state.asked, torch.float32)
    stats = stats_of(x_TI)
    step = Losparse(ratio=0.4, density=0.1)
    current = step.compress(state, stats).current
    assert isinstance(current, Sum)
    assert int(current.base.mask_OI.sum()) == step.kept((48, 64)) == 48 * 6
    factors = lost(state, result_of(SvdLlm(ratio=0.4), state, stats), x_TI)
    assert lost(state, current.dequantize(), x_TI) < factors


@pytest.mark.parametrize("rank", [3, 8])
def test_randomised_decomposition_of_a_falling_spectrum(rank: int, monkeypatch) -> None:
    monkeypatch.setattr("pocketlm.core.linalg.EXACT_SIDE", 16)
    draw = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(80, 60, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(90, 60, generator=draw)).Q.T
    values = 0.8 ** torch.arange(60.0)
    found = truncated_svd(left * values @ right, rank)
    assert torch.allclose(found[1], values[:rank], rtol=1e-3)
    assert torch.equal(found[0], truncated_svd(left * values @ right, rank)[0])
