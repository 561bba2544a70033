"""Refinement on the Hessian: the scales that suit the codes, then the codes that suit the scales.

For the weight's squared output error  sum_o (w_o - q_o) H (w_o - q_o)ᵀ:

- scales, codes fixed: q_o = sum_g s_og c_og is linear in the G scales of a row, so they solve
  A s = b with A_gk = c_og H_gk c_okᵀ and b_g = c_og (H w_o)_g, one small system a row;
- codes, scales fixed: coordinate descent, column by column; the best code of column i is the
  nearest to w_i - (error without i)·H_i / H_ii (QuantEase, arXiv:2309.01885, eq. 9-10).

Both lower the error or leave it. Symmetric grids refine scales and codes, asymmetric ones codes.
Cost: each round of codes is a GPTQ sweep; scales take O(rows · columns²) as well.

Legend: O output rows, I input columns, G groups of a row, i columns of a group, C of a block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Strict
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.tensors import PackedInt
from pocketlm.quant.grid import smallest_scale

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
    summary: ClassVar[str] = "scales and codes renewed in turn on the Hessian, after gptq"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})

    rounds: int = Field(1, ge=1, le=100)
    damping: float = Field(0.01, gt=0, le=1)
    shrinkage: float = Field(0.15, ge=0, le=10)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear with renewed scales and codes.

        Raises:
            UnsupportedLayer: If no earlier step has quantized the linear.
        """
        packed = state.grid()
        if packed is None:
            raise UnsupportedLayer(
                "refine found no quantized weight.",
                where=state.name,
                remedy="Put it after a quantizing step such as gptq or rtn.",
            )
        hessian = stats[Hessian]
        if not bool((hessian.diagonal_I() > 0).any()):
            return state.with_current(packed, Note("no_tokens", "refine had no calibration token."))
        hessian_II = hessian.shrunk_II(self.shrinkage)
        hessian_II.diagonal().add_(self.damping * hessian_II.diagonal().mean())
        weight_OI = state.reference_OI
        for _ in range(self.rounds):
            packed = renewed_scales(weight_OI, packed, hessian_II)
            packed = renewed_codes(weight_OI, packed, hessian_II, state.spec)
        return state.with_current(packed)

    def cost(self, rows: int, columns: int) -> Cost:
        """Per round: one solve for the scales, one sweep for the codes."""
        held = 4 * (5 * rows * columns + columns * columns)
        flops = self.rounds * 8.0 * rows * columns * columns
        return Cost(held, flops, self.rounds * 9 * columns)


def renewed_scales(
    weight_OI: Float[Tensor, "o i"], packed: PackedInt, hessian_II: Float[Tensor, "i i"]
) -> PackedInt:
    """The least-squares scales for given codes, rounded to their stored dtype.

    Args:
        weight_OI: The original weight.
        packed: Its codes; an asymmetric grid is returned as it is.
        hessian_II: Damped Hessian of the inputs.

    Returns:
        The same codes under new scales.
    """
    if packed.zero_OG is not None:
        return packed
    rows, columns = weight_OI.shape
    groups = packed.scale_OG.shape[1]
    codes_OGi = packed.codes_OI.to(weight_OI.dtype).view(rows, groups, -1)
    right_OG = ((weight_OI @ hessian_II).view(rows, groups, -1) * codes_OGi).sum(-1)
    left_OGG = torch.empty(rows, groups, groups, dtype=weight_OI.dtype, device=weight_OI.device)
    width = columns // groups
    for group in range(groups):
        moved_OI = codes_OGi[:, group] @ hessian_II[group * width : (group + 1) * width]
        left_OGG[:, group] = (moved_OI.view(rows, groups, -1) * codes_OGi).sum(-1)
    diagonal_OG = left_OGG.diagonal(dim1=1, dim2=2)
    # A group whose codes are all zero has no say: its row of the system becomes the identity.
    diagonal_OG += RIDGE * diagonal_OG.mean(-1, keepdim=True) + (diagonal_OG == 0)
    scale_OG = torch.linalg.solve(left_OGG, right_OG[:, :, None])[:, :, 0]
    stored_OG = scale_OG.to(packed.scale_OG.dtype)
    tiny = smallest_scale(stored_OG.dtype)
    good_OG = torch.isfinite(stored_OG) & (stored_OG.abs() >= tiny)
    return PackedInt(
        packed.codes_OI, torch.where(good_OG, stored_OG, packed.scale_OG), None, packed.bits
    )


def renewed_codes(
    weight_OI: Float[Tensor, "o i"],
    packed: PackedInt,
    hessian_II: Float[Tensor, "i i"],
    spec: QuantSpec,
) -> PackedInt:
    """One round of coordinate descent over the codes, all rows at once.

    Args:
        weight_OI: The original weight.
        packed: Codes to start from, and the grid.
        hessian_II: Damped Hessian of the inputs.
        spec: Bits of the grid.

    Returns:
        Codes of no larger error on the same grid.
    """
    columns = weight_OI.shape[1]
    weight_IO = weight_OI.T.contiguous()
    group_I = torch.arange(columns, device=weight_OI.device) // packed.group_size
    scale_IO = packed.scale_OG.to(weight_OI.dtype).T[group_I].contiguous()
    zero_IO = None
    if packed.zero_OG is not None:
        zero_IO = packed.zero_OG.to(weight_OI.dtype).T[group_I]
    error_IO = weight_IO - packed.dequantize(weight_OI.dtype).T
    codes_IO = torch.empty_like(weight_IO)
    inverse_I = 1.0 / hessian_II.diagonal()
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        slope_CO = hessian_II[start:stop] @ error_IO
        hessian_CC = hessian_II[start:stop, start:stop]
        for i in range(start, stop):
            # The error that column i should have, given all others, is error_i - slope_i / H_ii.
            wanted_O = weight_IO[i] - error_IO[i] + slope_CO[i - start] * inverse_I[i]
            codes_O = torch.round(wanted_O / scale_IO[i])
            if zero_IO is not None:
                codes_O += zero_IO[i]
            codes_O = codes_O.clamp_(spec.code_min, spec.code_max)
            codes_IO[i] = codes_O
            decoded_O = (codes_O if zero_IO is None else codes_O - zero_IO[i]) * scale_IO[i]
            new_O = weight_IO[i] - decoded_O
            slope_CO.addr_(hessian_CC[:, i - start], new_O - error_IO[i])
            error_IO[i] = new_O
    codes_OI = codes_IO.T.to(torch.int8).contiguous()
    return PackedInt(codes_OI, packed.scale_OG, packed.zero_OG, packed.bits)
