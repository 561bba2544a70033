"""The steps that prune one linear at a time: a score, a pattern, an allocation, a repair.

Each method of the literature is a choice on the four axes under its own name; options change one
axis and leave the others.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from pocketlm.core.spec import Strict, matches
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Stat
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.tensors import Dense
from pocketlm.prune.patterns import Scope, kept
from pocketlm.prune.scores import SCORES

HALF = SparsitySpec(ratio=0.5)


class Magnitude(Strict):
    """Keeps the largest weights; no data. The baseline of every other method.

    Attributes:
        sparsity: Share of zeros or N:M.
        score: What a weight is worth: magnitude, wanda, obd, ria, obs or esparse.
        scope: Which weights compete where the sparsity is a share: of a row, or of the matrix.
        overrides: Pattern → another share of zeros; the last matching pattern rules.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    summary: ClassVar[str] = "pruning by the size of the weights, no data"
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"mask"})

    sparsity: SparsitySpec = HALF
    score: str = "magnitude"
    scope: Scope = "matrix"
    overrides: dict[str, SparsitySpec] = Field(default_factory=dict)

    @field_validator("score")
    @classmethod
    def _known(cls, score: str) -> str:
        if score not in SCORES:
            raise ValueError(f"'{score}' is none of {', '.join(SCORES)}")
        return score

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

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear with its least weights set to zero."""
        mask_OI = self._mask_OI(state, stats)
        return pruned(state, state.reference_OI * mask_OI, mask_OI)

    def _mask_OI(self, state: LinearState, stats: Statistics) -> Tensor:
        score_OI = SCORES[self.score].of(state.reference_OI, stats)
        return kept(score_OI, self.sparsity_of(state.name), self.scope)

    def cost(self, rows: int, columns: int) -> Cost:
        """A sort of the scores."""
        return Cost(bytes_held=25 * rows * columns, flops=60.0 * rows * columns, calls=20)


class Wanda(Magnitude):
    """Keeps in each row what weighs most with the inputs' size, |w| · |x| (arXiv:2306.11695)."""

    summary: ClassVar[str] = "pruning by weight times input size, row by row"

    score: str = "wanda"
    scope: Scope = "row"


class Ria(Magnitude):
    """Relative importance within row and column, with the inputs' size (RIA)."""

    summary: ClassVar[str] = "pruning by relative importance and input size"

    score: str = "ria"
    scope: Scope = "row"


class Sparsegpt(Magnitude):
    """Keeps what costs most to lose once the others have made up for it (no update of them yet)."""

    summary: ClassVar[str] = "pruning by the loss of a weight, w² / [H⁻¹]_ii"

    score: str = "obs"
    scope: Scope = "row"


def pruned(state: LinearState, weight_OI: Tensor, mask_OI: Tensor, *notes: Note) -> LinearState:
    """A linear whose weight is pruned: what follows approximates the pruned weight."""
    state = replace(state, reference_OI=weight_OI, mask_OI=mask_OI)
    return state.with_current(Dense(weight_OI), *notes)
