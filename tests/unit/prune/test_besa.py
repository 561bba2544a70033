"""The learned allocation: exact budgets, gradients of masks, and shares that lower the error."""

from __future__ import annotations

import numpy
import pytest
import torch
from tests.unit.prune.linears import SumOfLinears, state_of, statistics, weight
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.core.reconstruct import block_error
from pocketlm.core.state import Statistics
from pocketlm.prune.allocation import ALLOCATIONS
from pocketlm.prune.besa import Budget, MaskedWeight, learned_shares
from pocketlm.prune.scores import wanda
from pocketlm.prune.steps import Wanda

MEAN = 0.6


def block(loud: float = 30.0) -> tuple[SumOfLinears, dict[str, Statistics], Tensor]:
    """Two linears of different size that read one input; one matters far more than the other."""
    x_BTI = torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(0))
    weights = {"loud": loud * weight(12, 32), "quiet": weight(24, 32, seed=2)}
    return SumOfLinears(weights, x_BTI), dict.fromkeys(weights, statistics(x_BTI[0])), x_BTI


def learners(
    task: SumOfLinears, stats: dict[str, Statistics], mean: float = MEAN
) -> dict[str, MaskedWeight]:
    budget = Budget(mean)
    made = {
        name: MaskedWeight(state, wanda(state.reference_OI, stats[name]), budget)
        for name, state in task.states.items()
    }
    budget.learners = tuple(made.values())
    return made


def test_what_matters_keeps_more_and_the_budget_holds() -> None:
    task, stats, _ = block()
    shares = {name: found[0] for name, found in learned_shares(task, stats, MEAN).items()}
    sizes = {name: state.reference_OI.numel() for name, state in task.states.items()}
    mean = sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values())
    assert mean == pytest.approx(MEAN, abs=1e-5)
    assert shares["loud"] < MEAN - 0.1 < MEAN + 0.02 < shares["quiet"]


def test_learned_shares_lower_the_blocks_error() -> None:
    task, stats, _ = block()
    uniform = learners(task, stats)
    before = block_error(task, uniform)
    shares = learned_shares(task, stats, MEAN)
    after = sum(
        float((task.forward(_pruned(task, stats, shares), i) - task.targets(i)).square().mean())
        for i in range(task.batches)
    )
    assert after / task.batches < 0.7 * before


def _pruned(
    task: SumOfLinears, stats: dict[str, Statistics], shares: dict[str, tuple[float]]
) -> dict[str, Tensor]:
    """The weights that Wanda leaves at these shares."""
    made = {}
    for name, state in task.states.items():
        step = Wanda.parse({"sparsity": round(shares[name][0], 4)})
        made[name] = step.compress(state, stats[name]).reference_OI
    return made


def test_it_starts_from_wandas_mask_at_the_uniform_share() -> None:
    task, stats, _ = block()
    for name, learner in learners(task, stats, 0.5).items():
        expected = Wanda.parse({"sparsity": 0.5}).compress(task.states[name], stats[name])
        torch.testing.assert_close(learner.weight_OI(), expected.reference_OI)


def test_a_mask_passes_gradients_as_if_it_were_the_probability() -> None:
    """Against finite differences of the weight under probabilities in the place of the mask."""
    weight_OI, budget = weight(3, 8), Budget(0.4567)  # no rank at a kink
    learner = MaskedWeight(state_of(weight_OI), weight_OI.abs(), budget)
    other = MaskedWeight(state_of(weight(5, 8)), weight(5, 8).abs(), budget)
    budget.learners = (learner, other)
    wanted_OI = weight(3, 8, seed=3)
    for one in (learner, other):
        one.parameters[0].values.requires_grad_()
    (learner.weight_OI() * wanted_OI).sum().backward()
    gradient_D = learner.parameters[0].values.grad

    def soft() -> float:
        """Σ wanted · weight · K, K between candidates a straight line (NumPy's interp)."""
        belief_D = torch.softmax(learner.parameters[0].values.detach().double(), 0).numpy()
        candidates_D = numpy.linspace(0, 1, len(belief_D))
        own = belief_D @ candidates_D
        moved = 0.4567 - (own * 24 + 0.5 * 40) / 64
        keeps_I = numpy.interp(numpy.arange(8) / 8 - moved, candidates_D, belief_D.cumsum())
        order_OI = weight_OI.abs().argsort(dim=1, stable=True)
        ranked_OI = (weight_OI * wanted_OI).double().gather(1, order_OI)
        return float((ranked_OI * torch.from_numpy(keeps_I)).sum())

    values_D = learner.parameters[0].values.data
    for place in (0, 37, 100):
        found = []
        for step in (0.05, -0.05):
            values_D[place] += step
            found.append(soft())
            values_D[place] -= step
        slope = (found[0] - found[1]) / 0.1
        assert gradient_D is not None
        assert float(gradient_D[place]) == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_nothing_gained_leaves_the_uniform_share() -> None:
    """A block whose output no mask changes: the start is kept."""
    x_BTI = torch.randn(4, 10, 32)
    task = SumOfLinears({"a": torch.zeros(4, 32), "b": torch.zeros(8, 32)}, x_BTI)
    stats = dict.fromkeys(task.states, statistics(x_BTI[0]))
    assert learned_shares(task, stats, 0.3) == {
        "a": (pytest.approx(0.3),), "b": (pytest.approx(0.3),)
    }  # fmt: skip


def test_a_linear_without_tokens_is_ranked_by_size() -> None:
    task, stats, _ = block()
    stats["quiet"] = statistics(torch.zeros(0, 32))
    shares = learned_shares(task, stats, MEAN)
    assert shares["loud"][0] < shares["quiet"][0]


def test_spread_is_exact() -> None:
    looks = {"a": (0.9,), "b": (0.3,)}
    shares = ALLOCATIONS["besa"]().spread(looks, {"a": 100, "b": 300}, 0.5)
    assert shares["a"] * 100 + shares["b"] * 300 == pytest.approx(200)
    assert shares["a"] > shares["b"]


def test_beside_a_pattern_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="2:4 is the same for every linear"):
        Wanda.parse({"sparsity": "2:4", "allocation": "besa"})
