"""How sparse each linear of a block shall be, learned through the masks (BESA, arXiv:2402.16880).

A linear's share of zeros α is the mean of a learned distribution β over candidates p₀ … p_D from 0
to 1. The weight of rank r in its row (r: the share of the row that is worth less) stays with
probability K(r), and the mask, 1 where r ≥ α, passes gradients to K as if it were K:

    α = Σ_d β_d p_d        K(r) = Σ β_d over all d with p_d ≤ r
    minimise over β   |f(X; W) - f(X; W ⊙ M(β))|²

The masks are Wanda's. One β for a linear, the paper's layer-wise form; X is the original's.

Deviation: the block's mean share is the asked one in every step, since all distributions are moved
by what it is off; the paper adds a penalty to the objective, and may end beside the budget.

Cost: core/reconstruct.py, before the run. Legend: O output rows, I input columns, D + 1 candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.reconstruct import Parameter, Schedule, reconstruct
from pocketlm.core.state import BlockTask, LinearState, Statistics
from pocketlm.prune.scores import wanda_or_size

CANDIDATES = 100  # D
ITERATIONS = 100
BATCH_SIZE = 8
RATE = 0.05


def learned_shares(
    task: BlockTask, stats: Mapping[str, Statistics], mean: float
) -> dict[str, tuple[float]]:
    """The share of zeros of each linear of a block, their mean over weights the asked one.

    Args:
        task: The block, its inputs and what it gives for them.
        stats: Hessians of what flows into its linears, by module path.
        mean: The share of zeros of the whole block.

    Returns:
        By module path; the uniform share for all where learning gained nothing.
    """
    budget = Budget(mean)
    learners = {
        name: MaskedWeight(state, wanda_or_size(state.reference_OI, stats[name]), budget)
        for name, state in task.states.items()
    }
    budget.learners = tuple(learners.values())
    reconstruct(task, learners, Schedule("adam", ITERATIONS, BATCH_SIZE))
    with torch.no_grad():
        return {name: (float(learner.share()),) for name, learner in learners.items()}


class Budget:
    """What the distributions of a block are moved by together, so that their mean is the asked one.

    Args:
        mean: The asked share of zeros.
    """

    def __init__(self, mean: float) -> None:
        self._mean = mean
        self.learners: Sequence[MaskedWeight] = ()

    def moved(self) -> Tensor:
        """The distance, differentiable in all distributions."""
        total = sum(learner.count for learner in self.learners)
        parts = [learner.own_share() * (learner.count / total) for learner in self.learners]
        return self._mean - torch.stack(parts).sum()


class MaskedWeight:
    """A Learner: the weight under a mask whose share of zeros is learned.

    Args:
        state: The linear.
        score_OI: What its weights are worth.
        budget: Of the block.
    """

    def __init__(self, state: LinearState, score_OI: Tensor, budget: Budget) -> None:
        self._weight_OI, self._budget = state.reference_OI, budget
        self.count = self._weight_OI.numel()
        self._order_OI = torch.argsort(score_OI, dim=1, stable=True)
        columns, device = score_OI.shape[1], score_OI.device
        self._rank_I = torch.arange(columns, device=device) / columns
        self._candidates_D = torch.linspace(0, 1, CANDIDATES + 1, device=device)
        logits_D = torch.zeros(CANDIDATES + 1, device=device)
        self.parameters: Sequence[Parameter] = (Parameter(logits_D, RATE),)

    def _belief_D(self) -> Tensor:
        return torch.softmax(self.parameters[0].values, dim=0)

    def own_share(self) -> Tensor:
        """α before all are moved to the budget."""
        return self._belief_D() @ self._candidates_D

    def share(self) -> Tensor:
        """α."""
        return self.own_share() + self._budget.moved()

    def weight_OI(self) -> Tensor:
        """The weight [O, I] under its mask, differentiable in β."""
        # K at each rank, between candidates a straight line: how much of each lies below.
        place_I = (self._rank_I - self._budget.moved()) * CANDIDATES
        place_I1 = place_I.clamp(0, CANDIDATES)[:, None]
        number_D = torch.arange(CANDIDATES + 1, device=place_I.device)
        stays_I = (place_I1 - number_D + 1).clamp(0, 1) @ self._belief_D()
        hard_I = (self._rank_I >= self.share().detach()).to(stays_I.dtype)
        return ByRank.apply(self._weight_OI, self._order_OI, hard_I + stays_I - stays_I.detach())


class ByRank(torch.autograd.Function):
    """Multiplies the weight of each rank in its row by one factor; sums in a fixed order."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, order_OI: Tensor, factor_I: Tensor) -> Tensor:
        """The weight [O, I]; order_OI [O, I] are a row's columns from the least worth on."""
        ctx.save_for_backward(weight_OI, order_OI)
        factor_OI = torch.empty_like(weight_OI)
        factor_OI.scatter_(1, order_OI, factor_I.expand_as(weight_OI).contiguous())
        return weight_OI * factor_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the factors [I]."""
        weight_OI, order_OI = ctx.saved_tensors
        return None, None, (gradients[0] * weight_OI).gather(1, order_OI).sum(0)
