"""Refinement on the Hessian: the scales that suit the codes, then the codes that suit the scales.

For the weight's squared output error  sum_o (w_o - q_o) H (w_o - q_o)ᵀ, c the levels of the codes:

- scales, codes fixed: q_o = sum_g s_og c_og is linear in the G scales of a row, so they solve
  A s = b with A_gk = c_og H_gk c_okᵀ and b_g = c_og (H w_o)_g, one small system a row;
- codes, scales fixed: coordinate descent, column by column; the best level of column i is the
  nearest to w_i - (error without i)·H_i / H_ii (QuantEase, arXiv:2309.01885, eq. 9-10).

Both lower the error or leave it. Codes are refined on every grid. Scales are on symmetric grids
with a scale for each group of a row: where they are stored in 8 bits (E8M0, E4M3) they are rounded
to those, and a row keeps its old ones if they are no worse. Scales that are quantized together
(double quantization) or shared by rows (FP8 tensors and blocks) stay.
Cost: each round of codes is a GPTQ sweep; scales take O(rows · columns²) as well.

Legend: O output rows, I input columns, G groups of a row, i columns of a group, C of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pocketlm.core.columns import Rounding, descend
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.levels import levels_of
from pocketlm.core.linalg import product
from pocketlm.core.spec import QuantSpec, Strict
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.quant.grid import Grid, packed, renewed

RIDGE = 1e-6  # share of the mean diagonal that keeps a row's system solvable
BLOCK_COLUMNS = 128


class Refine(Strict):
    """Alternates scales and codes after a quantizing step.

    Attributes:
        rounds: How often both are renewed.
        damping: Share of the Hessian's mean diagonal that is added, as in GPTQ.
        shrinkage: Share of each column's own diagonal that is added, as in GPTQ.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    rounds: int = Field(1, ge=1, le=100)
    damping: float = Field(0.01, gt=0, le=1)
    shrinkage: float = Field(0.15, ge=0, le=10)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear with renewed scales and codes.

        Raises:
            UnsupportedLayer: If no earlier step has quantized the linear.
        """
        current = state.grid()
        if current is None:
            raise UnsupportedLayer(
                "refine found no quantized weight.",
                where=state.name,
                remedy="Put it after a quantizing step such as gptq or rtn.",
            )
        hessian = stats[Hessian]
        if not hessian.reached:
            return state.with_current(
                current, Note("no_tokens", "refine had no calibration token.")
            )
        hessian_II = hessian.shrunk_II(self.shrinkage)
        hessian_II.diagonal().add_(self.damping * hessian_II.diagonal().mean())
        weight_OI = state.reference_OI
        for _ in range(self.rounds):
            current = renewed_scales(weight_OI, current, hessian_II, state.spec)
            current = renewed_codes(weight_OI, current, hessian_II, state.spec, state.mask_OI)
        return state.with_current(current)

    def cost(self, rows: int, columns: int) -> Cost:
        """Per round: one solve for the scales, one sweep for the codes."""
        held = 4 * (5 * rows * columns + columns * columns)
        flops = self.rounds * 8.0 * rows * columns * columns
        moved = self.rounds * 4.0 * rows * columns * (BLOCK_COLUMNS + 30)
        return Cost(held, flops, self.rounds * 9 * columns, moved, kernel=True)


def renewed_scales(
    weight_OI: Float[Tensor, "o i"],
    current: Packed,
    hessian_II: Float[Tensor, "i i"],
    spec: QuantSpec,
) -> Packed:
    """The least-squares scales for given codes, rounded as they are stored.

    Args:
        weight_OI: The original weight.
        current: Its codes; a grid whose scales stay (see above) is returned as it is.
        hessian_II: Damped Hessian of the inputs.
        spec: Number format and tiles.

    Returns:
        The same codes under new scales.
    """
    if not spec.symmetric or spec.group_rows != 1 or spec.scale == "dynamic8":
        return current
    grid = Grid.of(current)
    rows, columns = weight_OI.shape
    groups = grid.scale_OG.shape[1]
    level_OGi = levels_of(current.codes_OI, spec).to(weight_OI.dtype).view(rows, groups, -1)
    right_OG = (product(weight_OI, hessian_II).view(rows, groups, -1) * level_OGi).sum(-1)
    left_OGG = torch.empty(rows, groups, groups, dtype=weight_OI.dtype, device=weight_OI.device)
    width = columns // groups
    for group in range(groups):  # symmetric: what is right of the diagonal is below it too
        start = group * width
        moved_OI = level_OGi[:, group] @ hessian_II[start : start + width, start:]
        beside_OG = (moved_OI.view(rows, groups - group, -1) * level_OGi[:, group:]).sum(-1)
        left_OGG[:, group, group:] = left_OGG[:, group:, group] = beside_OG
    diagonal_OG = left_OGG.diagonal(dim1=1, dim2=2)
    # A group whose codes are all zero has no say: its row of the system becomes the identity.
    diagonal_OG += RIDGE * diagonal_OG.mean(-1, keepdim=True) + (diagonal_OG == 0)
    scale_OG = torch.linalg.solve(left_OGG, right_OG[:, :, None])[:, :, 0]
    new = renewed(grid, scale_OG, spec)
    if spec.scale != "float":
        errors = [_row_errors(weight_OI, level_OGi, g.scale_OG, hessian_II) for g in (grid, new)]
        better_O1 = (errors[1] < errors[0])[:, None]
        new = renewed(grid, torch.where(better_O1, new.scale_OG, grid.scale_OG), spec)
    if isinstance(current, PackedInt):
        return PackedInt(current.codes_OI, new.scale_OG, None, current.bits)
    assert new.stored is not None
    return replace(current, scale=new.stored)


def _row_errors(
    weight_OI: Tensor, level_OGi: Tensor, scale_OG: Tensor, hessian_II: Tensor
) -> Tensor:
    """The squared output error of each row [O]."""
    error_OI = weight_OI - (level_OGi * scale_OG[:, :, None]).view(weight_OI.shape)
    return ((error_OI @ hessian_II) * error_OI).sum(1)


def renewed_codes(
    weight_OI: Float[Tensor, "o i"],
    current: Packed,
    hessian_II: Float[Tensor, "i i"],
    spec: QuantSpec,
    mask_OI: Tensor | None = None,
) -> Packed:
    """One round of coordinate descent over the codes, all rows at once.

    Args:
        weight_OI: The original weight.
        current: Codes to start from, and the grid.
        hessian_II: Damped Hessian of the inputs.
        spec: Number format and tiles.
        mask_OI: Bool: which weights stay; the others are zero and remain so.

    Returns:
        Codes of no larger error on the same grid.
    """
    rows, columns = weight_OI.shape
    grid = Grid.of(current)
    weight_IO = weight_OI.T.contiguous()
    rounding = Rounding(spec, *grid.by_column((rows, columns), spec))
    error_IO = weight_IO - current.dequantize(weight_OI.dtype).T
    level_IO = torch.empty_like(weight_IO)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        level_IO[start:stop] = descend(
            weight_IO[start:stop],
            error_IO[start:stop],
            hessian_II[start:stop] @ error_IO,
            hessian_II[start:stop, start:stop],
            rounding.part(start, stop),
            None if mask_OI is None else mask_OI[:, start:stop].T,
        )
    return packed(level_IO.T.contiguous(), grid, spec)
