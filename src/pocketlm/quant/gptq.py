"""GPTQ: rounds a weight column by column and lets the later columns make up for each error.

With H = UᵀU inverse-factored (arXiv:2210.17323, eq. 2-3 and algorithm 1), for each column i:
    e = (w_i - Q(w_i)) / U_ii,   w_j -= e U_ij  for all j > i.

The Hessian's diagonal is raised in proportion, H + a diag(H): columns with massive inputs stay
exact, and what inputs of the calibration text happen to share is trusted less (`shrinkage`; with
a = 0 and damping this is the paper's method; docs/experiments.md has what it gains).

Columns go in order of falling Hessian diagonal; groups are static, so that a column keeps the scale
of the place where it is stored and no engine needs an index (`g_idx`).
Cost: O(rows · columns²) for the sweep, O(columns³) once for linears that share an input.

Legend: O output rows, I input columns, C columns of one block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pocketlm.core import feedback
from pocketlm.core.columns import Rounding
from pocketlm.core.linalg import InverseFactor
from pocketlm.core.spec import QuantSpec, Strict
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.quant.grid import Grid, grid_of, packed, round_to_grid


class Gptq(Strict):
    """GPTQ with static groups.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added before it is inverted.
        shrinkage: Share of each column's own diagonal that is added: less trust in how inputs go
            together, as much in how large they are.
        block_columns: Columns between two updates of the whole rest of the weight.
        order: "activation": columns by falling Hessian diagonal; "stored": as they lie.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "grid", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    damping: float = Field(0.01, gt=0, le=1)
    shrinkage: float = Field(0.15, ge=0, le=10)
    block_columns: int = Field(128, ge=1)
    order: Literal["activation", "stored"] = "activation"

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear on its grid, an earlier step's grid or else min-max."""
        grid = grid_of(state)
        hessian = stats[Hessian]
        if not hessian.reached:
            note = Note("no_tokens", "no calibration token reached it: rounded to nearest.")
            return state.with_current(round_to_grid(state.reference_OI, grid, state.spec), note)
        order_I = column_order(hessian, self.order)
        factor = hessian.inverse_factor(self.damping, order_I, self.shrinkage)
        level_OI = sweep(
            state.reference_OI, factor, grid, state.spec, order_I, self.block_columns, state.mask_OI
        )
        return state.with_current(packed(level_OI, grid, state.spec), *ladder_notes(factor))

    def cost(self, rows: int, columns: int) -> Cost:
        """The sweep: the weight, its codes and scales by column; and the factor of the Hessian."""
        held = 4 * (4 * rows * columns + 5 * columns * columns)
        flops = float(rows) * columns * columns + columns**3
        moved = 4.0 * rows * columns * (self.block_columns + 20)  # half a block, read and written
        return Cost(held, flops, calls=9 * columns, bytes_moved=moved, kernel=True)


def column_order(hessian: Hessian, order: str) -> Tensor | None:
    """The columns [I] by falling Hessian diagonal, or None for the stored order."""
    if order == "stored":
        return None
    return torch.argsort(hessian.diagonal_I(), descending=True, stable=True)


def ladder_notes(factor: InverseFactor) -> tuple[Note, ...]:
    """What is to be told of how a Hessian was factorised."""
    if not factor.rung:
        return ()
    text = f"the Hessian was not positive definite; what held: {factor.rung}."
    return (Note("damping", text, {"damping": factor.damping, "rung": factor.rung}),)


def sweep(
    weight_OI: Float[Tensor, "o i"],
    factor: InverseFactor,
    grid: Grid,
    spec: QuantSpec,
    order_I: Tensor | None = None,
    block_columns: int = 128,
    mask_OI: Tensor | None = None,
) -> Tensor:
    """Rounds a weight with error feedback.

    Args:
        weight_OI: The weight, float32.
        factor: U of the damped Hessian, its columns already in `order_I`.
        grid: Scales and zero points of the stored columns.
        spec: Number format and tiles.
        order_I: The order in which columns are rounded; None as stored.
        block_columns: Columns between two updates of the rest.
        mask_OI: Bool: which weights stay; the others become zero, and later columns make up for
            what feedback had put there. None: all stay.

    Returns:
        Levels [O, I] in the stored order, as `core.levels` means them.
    """
    rows, columns = weight_OI.shape
    order_I = torch.arange(columns, device=weight_OI.device) if order_I is None else order_I
    rounding = Rounding(spec, *grid.by_column((rows, columns), spec, order_I))
    mask_IO = None if mask_OI is None else mask_OI.T[order_I]
    return feedback.sweep(weight_OI, factor.upper_II, order_I, block_columns, rounding, mask_IO)
