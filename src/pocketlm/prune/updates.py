"""The steps that prune one linear at a time and move what stays, so that its output stays near.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pocketlm.core.columns import Rounding
from pocketlm.core.linalg import InverseFactor
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.prune.admm import alternate, solve
from pocketlm.prune.patterns import Scope
from pocketlm.prune.steps import Pruning, pruned
from pocketlm.prune.sweep import Swept, prune_columns
from pocketlm.quant.gptq import ladder_notes
from pocketlm.quant.grid import grid_of, packed, round_to_grid


class _OnHessian(Pruning):
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
        done = self._swept(state, factor)
        weight_OI = done.weight_OI
        if self.steps:
            hessian_II = self._hessian_II(hessian)
            start_OI, mask_OI = weight_OI, done.mask_OI
            weight_OI = solve(state.reference_OI, hessian_II, mask_OI, start_OI, self.steps)
        return pruned(state, weight_OI, done.mask_OI, *ladder_notes(factor))

    def _swept(
        self, state: LinearState, factor: InverseFactor, rounding: Rounding | None = None
    ) -> Swept:
        weight_OI, sparsity = state.reference_OI, self.sparsity_of(state.name)
        width = self.block_columns
        return prune_columns(weight_OI, factor.upper_II, sparsity, self.scope, width, rounding)

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
        done = self._swept(state, factor, Rounding(spec, *grid.by_column(state.shape, spec)))
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
