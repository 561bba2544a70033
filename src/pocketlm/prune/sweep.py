"""SparseGPT: prunes column by column, and the later columns make up for what is lost.

The sweep is GPTQ's (`core.feedback`). The mask is chosen anew for each block of columns, from the
weights as they are by then: those of least w² / U_ii² go, U_ii² being [H⁻¹]_ii once all earlier
columns are settled (arXiv:2301.00774 and its code; N:M: at each group's first column). Given a
grid, kept weights are rounded in the same sweep, so that later columns also make up for that.

Cost: O(rows · columns²) for the sweep, O(columns³) once for linears that share an input.

Legend: O output rows, I input columns, C columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core import feedback
from pocketlm.core.columns import Rounding
from pocketlm.core.stored import SparsitySpec
from pocketlm.prune.patterns import Scope, kept


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves.

    Attributes:
        weight_OI: Pruned, and rounded where there was a grid.
        mask_OI: What was kept.
        level_OI: Levels of the weights on the grid; None without one.
    """

    weight_OI: Tensor
    mask_OI: Tensor
    level_OI: Tensor | None


def prune_columns(
    weight_OI: Float[Tensor, "o i"],
    upper_II: Float[Tensor, "i i"],
    sparsity: SparsitySpec,
    scope: Scope = "matrix",
    block_columns: int = 128,
    rounding: Rounding | None = None,
) -> Swept:
    """Prunes a weight with error feedback.

    Args:
        weight_OI: The weight, float32.
        upper_II: U of the damped Hessian, H⁻¹ = UᵀU, columns as stored.
        sparsity: How many weights go; of each block of columns where it is a share.
        scope: Whether the weights of a block compete within rows or all together.
        block_columns: Columns whose mask is chosen at once; rounded up to whole groups of N:M.
        rounding: The grid to round to; None: kept weights stay floats.
    """
    group = sparsity.of or 1
    width = -(-block_columns // group) * group
    mask_IO = torch.ones(weight_OI.T.shape, dtype=torch.bool, device=weight_OI.device)

    def choose(rest_CO: Tensor, upper_CC: Tensor) -> Tensor:
        score_OC = (rest_CO / upper_CC.diagonal()[:, None]).square().T
        return kept(score_OC, sparsity, scope).T

    settled_OI = feedback.sweep(weight_OI, upper_II, None, width, rounding, mask_IO, choose)
    mask_OI = mask_IO.T.contiguous()
    if rounding is None:
        return Swept(settled_OI, mask_OI, None)
    return Swept(settled_OI * rounding.scale_IO.T, mask_OI, settled_OI)
