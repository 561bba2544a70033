"""The steps that prune one linear at a time: a score, a pattern, an allocation, a repair.

Each method of the literature is a choice on the four axes under its own name; options change one
axis and leave the others. Here what stays keeps its value; in prune/updates.py it moves.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pocketlm.core.spec import Strict, matches
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.tensors import Dense
from pocketlm.prune.allocation import ALLOCATIONS, Allocation
from pocketlm.prune.dsnot import exchange
from pocketlm.prune.moments import Moments
from pocketlm.prune.patterns import Scope, kept
from pocketlm.prune.scores import SCORES

HALF = SparsitySpec(ratio=0.5)


class Pruning(Strict):
    """Sets the least weights of each linear to zero; those that stay keep their values.

    Attributes:
        sparsity: Share of zeros or N:M.
        score: What a weight is worth: magnitude, wanda, obd, ria, obs, esparse or
            gblm.
        scope: Which weights compete where the sparsity is a share: of a row, or of the matrix.
        allocation: How the share is spread over the linears: uniform, owl, samsp, global (one
            threshold), or besa (learned). It becomes `overrides` before the run begins.
        overrides: Pattern → another share of zeros; the last matching pattern rules.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    preserves: ClassVar[frozenset[str]] = frozenset({"shape", "values"})
    makes: ClassVar[frozenset[str]] = frozenset({"mask"})

    sparsity: SparsitySpec = HALF
    score: str = "wanda"
    scope: Scope = "row"
    allocation: Literal["uniform", "owl", "samsp", "global", "besa"] = "uniform"
    overrides: dict[str, SparsitySpec] = Field(default_factory=dict)

    @field_validator("score")
    @classmethod
    def _known(cls, score: str) -> str:
        if score not in SCORES:
            raise ValueError(f"'{score}' is none of {', '.join(SCORES)}")
        return score

    @model_validator(mode="after")
    def _alike(self) -> Self:
        spread = self.allocation != "uniform"
        if self.sparsity.pattern is not None and (spread or self.overrides):
            raise ValueError(f"{self.sparsity.name} is the same for every linear")
        if any(other.pattern is not None for other in self.overrides.values()):
            raise ValueError("overrides are shares of zeros, not N:M")
        return self

    @property
    def survey(self) -> Allocation | None:
        """What decides how sparse each linear becomes; None: that is settled."""
        return None if self.allocation == "uniform" else ALLOCATIONS[self.allocation]()

    @property
    def needs(self) -> tuple[type[Stat], ...]:
        """What the score is made of."""
        return SCORES[self.score].needs

    def sparsity_of(self, name: str) -> SparsitySpec:
        """How sparse the linear `name` becomes."""
        chosen = self.sparsity
        for pattern, sparsity in self.overrides.items():
            if matches(pattern, name):
                chosen = sparsity
        return chosen

    def kept(self, name: str, shape: tuple[int, int]) -> int:
        """How many weights of a linear stay."""
        sparsity, (rows, columns) = self.sparsity_of(name), shape
        if sparsity.pattern is not None or self.scope == "row":
            return rows * (columns - sparsity.pruned(columns))
        return rows * columns - sparsity.pruned(rows * columns)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear with its least weights set to zero; by magnitude where no token reached it."""
        if self.needs and not stats[Hessian].reached:
            return self._without_data(state)
        return self._with_data(state, stats)

    def _with_data(self, state: LinearState, stats: Statistics) -> LinearState:
        mask_OI = self._mask_OI(state, stats)
        return pruned(state, state.reference_OI * mask_OI, mask_OI)

    def _mask_OI(self, state: LinearState, stats: Statistics) -> Tensor:
        score_OI = SCORES[self.score].of(state.reference_OI, stats)
        return kept(score_OI, self.sparsity_of(state.name), self.scope)

    def _without_data(self, state: LinearState) -> LinearState:
        note = Note("no_tokens", "no calibration token reached it: pruned by magnitude.")
        width = self._competing(state.reference_OI.shape[1])
        sparsity = self.sparsity_of(state.name)
        parts = [
            kept(score_OC, sparsity, self.scope)
            for score_OC in state.reference_OI.abs().split(width, dim=1)
        ]
        mask_OI = torch.cat(parts, dim=1)
        return pruned(state, state.reference_OI * mask_OI, mask_OI, note)

    def _competing(self, columns: int) -> int:
        """How many neighbouring columns of a weight compete at once."""
        return columns

    def cost(self, rows: int, columns: int) -> Cost:
        """A sort of the scores."""
        return Cost(bytes_held=25 * rows * columns, flops=60.0 * rows * columns, calls=20)


class Magnitude(Pruning):
    """Keeps the largest weights; no data. The baseline of every other method."""

    score: str = "magnitude"
    scope: Scope = "matrix"


class Wanda(Pruning):
    """Keeps in each row what weighs most with the inputs' size, |w| · |x| (arXiv:2306.11695)."""


class Ria(Pruning):
    """Relative importance within row and column, with the inputs' size (RIA, arXiv:2402.17946)."""

    score: str = "ria"


class Esparse(Pruning):
    """Input size and the entropy of each channel (E-Sparse, arXiv:2310.15929)."""

    score: str = "esparse"


class Gblm(Pruning):
    """Input size and the loss's gradient (GBLM-Pruner, arXiv:2311.04902); a backward pass more."""

    score: str = "gblm"


class Dsnot(Wanda):
    """Wanda's mask, then kept and pruned weights change places (DSnoT, arXiv:2310.08915).

    Attributes:
        turns: Exchanges for each row, at most.
    """

    turns: int = Field(50, ge=1, le=10_000)

    @property
    def needs(self) -> tuple[type[Stat], ...]:
        """What the score is made of, and the inputs' mean and variance."""
        return tuple(dict.fromkeys((*super().needs, Hessian, Moments)))

    def _with_data(self, state: LinearState, stats: Statistics) -> LinearState:
        """Another mask of the same count; values stay."""
        weight_OI, sparsity = state.reference_OI, self.sparsity_of(state.name)
        norm_I = stats[Hessian].diagonal_I().sqrt()
        mask_OI = self._mask_OI(state, stats)
        mask_OI = exchange(weight_OI, mask_OI, stats[Moments], norm_I, sparsity, self.turns)
        return pruned(state, weight_OI * mask_OI, mask_OI)

    def cost(self, rows: int, columns: int) -> Cost:
        """A few passes over the weight each turn."""
        return Cost(40 * rows * columns, 20.0 * self.turns * rows * columns, 20 * self.turns)


def pruned(state: LinearState, weight_OI: Tensor, mask_OI: Tensor, *notes: Note) -> LinearState:
    """A linear whose weight is pruned: what follows approximates the pruned weight."""
    state = replace(state, reference_OI=weight_OI, mask_OI=mask_OI)
    return state.with_current(Dense(weight_OI), *notes)
