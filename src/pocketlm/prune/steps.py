"""The steps that prune one linear at a time: a score, a pattern, an allocation, a repair.

Each method of the literature is a choice on the four axes under its own name; options change one
axis and leave the others.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pocketlm.core.columns import Rounding
from pocketlm.core.spec import Strict, matches
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.tensors import Dense
from pocketlm.prune.admm import alternate, solve
from pocketlm.prune.allocation import ALLOCATIONS, Allocation
from pocketlm.prune.dsnot import exchange
from pocketlm.prune.moments import Moments
from pocketlm.prune.patterns import Scope, kept
from pocketlm.prune.scores import SCORES, reached
from pocketlm.prune.sweep import prune_columns
from pocketlm.quant.gptq import ladder_notes
from pocketlm.quant.grid import grid_of, packed, round_to_grid

HALF = SparsitySpec(ratio=0.5)


class Magnitude(Strict):
    """Keeps the largest weights; no data. The baseline of every other method.

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
    score: str = "magnitude"
    scope: Scope = "matrix"
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
        if self.needs and not reached(stats):
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


class Wanda(Magnitude):
    """Keeps in each row what weighs most with the inputs' size, |w| · |x| (arXiv:2306.11695)."""

    score: str = "wanda"
    scope: Scope = "row"


class Ria(Magnitude):
    """Relative importance within row and column, with the inputs' size (RIA)."""

    score: str = "ria"
    scope: Scope = "row"


class Esparse(Magnitude):
    """Input size and the entropy of each channel (E-Sparse, arXiv:2310.15929)."""

    score: str = "esparse"
    scope: Scope = "row"


class Gblm(Magnitude):
    """Input size and the loss's gradient (GBLM-Pruner, arXiv:2311.04902); a backward pass more."""

    score: str = "gblm"
    scope: Scope = "row"


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


class _OnHessian(Magnitude):
    """What steps that update weights share: a Hessian that is trusted in part.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added before it is inverted.
        shrinkage: Share of each column's own diagonal that is added, as in gptq.
    """

    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    scope: Scope = "matrix"
    damping: float = Field(0.01, gt=0, le=1)
    shrinkage: float = Field(0.15, ge=0, le=10)

    @property
    def needs(self) -> tuple[type[Stat], ...]:
        """The Hessian of the inputs."""
        return (Hessian,)

    def _hessian_II(self, hessian: Hessian) -> Tensor:
        """The Hessian, shrunk and damped."""
        hessian_II = hessian.shrunk_II(self.shrinkage)
        hessian_II.diagonal().add_(self.damping * hessian_II.diagonal().mean())
        return hessian_II


class Sparsegpt(_OnHessian):
    """Prunes column by column; later columns make up for what is lost (arXiv:2301.00774).

    Attributes:
        block_columns: Columns whose mask is chosen at once.
        steps: Of conjugate gradients that afterwards solve for the kept weights: a sweep cannot
            change earlier columns for later ones. The paper takes none.
    """

    score: Literal["obs"] = "obs"
    block_columns: int = Field(128, ge=1)
    steps: int = Field(0, ge=0, le=1000)

    def kept(self, name: str, shape: tuple[int, int]) -> int:
        """How many weights of a linear stay: of each block of columns its share."""
        rows, columns = shape
        width = self._competing(columns)
        blocks = [min(width, columns - start) for start in range(0, columns, width)]
        return sum(super(Sparsegpt, self).kept(name, (rows, block)) for block in blocks)

    def _competing(self, columns: int) -> int:
        group = self.sparsity.of or 1
        return -(-self.block_columns // group) * group

    def _with_data(self, state: LinearState, stats: Statistics) -> LinearState:
        """Kept weights have moved."""
        hessian = stats[Hessian]
        factor = hessian.inverse_factor(self.damping, None, self.shrinkage)
        done = prune_columns(
            state.reference_OI,
            factor.upper_II,
            self.sparsity_of(state.name),
            self.scope,
            self.block_columns,
        )
        weight_OI = done.weight_OI
        if self.steps:
            hessian_II = self._hessian_II(hessian)
            start_OI, mask_OI = weight_OI, done.mask_OI
            weight_OI = solve(state.reference_OI, hessian_II, mask_OI, start_OI, self.steps)
        return pruned(state, weight_OI, done.mask_OI, *ladder_notes(factor))

    def cost(self, rows: int, columns: int) -> Cost:
        """The sweep, its mask, and the factor of the Hessian."""
        held = 4 * (5 * rows * columns + 5 * columns * columns)
        flops = (1.0 + 2 * self.steps) * rows * columns * columns + columns**3
        moved = 4.0 * rows * columns * (self.block_columns + 20)
        return Cost(held, flops, calls=8 * columns, bytes_moved=moved, kernel=True)


class SparsegptJoint(Sparsegpt):
    """Prunes and rounds in one sweep over one Hessian (arXiv:2301.00774).

    The grid is an earlier step's (clip) or min-max; it is one of the unpruned weight.
    """

    preserves: ClassVar[frozenset[str]] = frozenset({"grid", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"mask", "grid"})

    def _without_data(self, state: LinearState) -> LinearState:
        grid = grid_of(state)
        state = super()._without_data(state)
        return state.with_current(round_to_grid(state.reference_OI, grid, state.spec))

    def _with_data(self, state: LinearState, stats: Statistics) -> LinearState:
        """On its grid, pruned; `refine` may follow."""
        grid, spec = grid_of(state), state.spec
        factor = stats[Hessian].inverse_factor(self.damping, None, self.shrinkage)
        done = prune_columns(
            state.reference_OI,
            factor.upper_II,
            self.sparsity_of(state.name),
            self.scope,
            self.block_columns,
            rounding=Rounding(spec, *grid.by_column(state.shape, spec)),
        )
        assert done.level_OI is not None
        state = replace(state, mask_OI=done.mask_OI)
        return state.with_current(packed(done.level_OI, grid, spec), *ladder_notes(factor))


class Alps(_OnHessian):
    """The mask by ADMM, then the best weights under it by conjugate gradients (arXiv:2406.07831).

    Attributes:
        rounds: Of ADMM, at most.
        steps: Of the conjugate gradients.
    """

    score: Literal["magnitude"] = "magnitude"
    rounds: int = Field(300, ge=1, le=10_000)
    steps: int = Field(20, ge=0, le=1000)

    def _with_data(self, state: LinearState, stats: Statistics) -> LinearState:
        """Kept weights have moved."""
        weight_OI, sparsity = state.reference_OI, self.sparsity_of(state.name)
        hessian_II = self._hessian_II(stats[Hessian])
        mask_OI = alternate(weight_OI, hessian_II, sparsity, self.scope, self.rounds)
        solved_OI = solve(weight_OI, hessian_II, mask_OI, steps=self.steps)
        return pruned(state, solved_OI, mask_OI)

    def cost(self, rows: int, columns: int) -> Cost:
        """Two products a round, one a step, and the eigenvectors of the Hessian."""
        products = 2 * self.rounds + self.steps
        flops = 2.0 * products * rows * columns * columns + 20.0 * columns**3
        held = 4 * (9 * rows * columns + 4 * columns * columns)
        return Cost(held, flops, 20 * products, 60.0 * self.rounds * rows * columns)


def pruned(state: LinearState, weight_OI: Tensor, mask_OI: Tensor, *notes: Note) -> LinearState:
    """A linear whose weight is pruned: what follows approximates the pruned weight."""
    state = replace(state, reference_OI=weight_OI, mask_OI=mask_OI)
    return state.with_current(Dense(weight_OI), *notes)
