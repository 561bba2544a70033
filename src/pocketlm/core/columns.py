"""One block of columns, settled one after another while each change is carried to the later ones.

- `feed_back`: a column settles on v; the later ones make up for its error (GPTQ, SparseGPT);
- `descend`: a column takes its best level, given all others (coordinate descent).

The loops here are the definition; on a GPU one Triton kernel does a whole block (`column_kernel`).

Legend: O output rows, I input columns, C columns of a block. Columns are rows of the transpose, so
that they lie together in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pocketlm.core.levels import rounder
from pocketlm.core.spec import QuantSpec


@dataclass(frozen=True)
class Rounding:
    """The grid that columns are rounded to.

    Attributes:
        spec: Number format.
        scale_IO: Scale of every weight, transposed.
        zero_IO: Zero points alike; None where there are none.
    """

    spec: QuantSpec
    scale_IO: Tensor
    zero_IO: Tensor | None

    def part(self, start: int, stop: int) -> Rounding:
        """The grid of some columns."""
        zero_CO = None if self.zero_IO is None else self.zero_IO[start:stop]
        return Rounding(self.spec, self.scale_IO[start:stop], zero_CO)


@cache
def kernel_trouble() -> str | None:
    """Why Triton kernels cannot run on this machine's GPU; None: they can.

    One small block is tried: Triton comes with PyTorch's CUDA builds, but it needs a C compiler and
    a driver it knows, and what it raises where they are not there is of many kinds.
    """
    try:
        from pocketlm.core.column_kernel import walk

        start_CO = torch.ones(16, 16, device="cuda")
        walk(start_CO, torch.eye(16, device="cuda"), None, None, None, None, None)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def serves(columns: Tensor) -> bool:
    """Whether kernels take a float32 tensor: it is on a GPU that Triton can use."""
    return columns.is_cuda and columns.dtype == torch.float32 and kernel_trouble() is None


def feed_back(
    rest_CO: Tensor, upper_CC: Tensor, rounding: Rounding | None, mask_CO: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Settles a block's columns: e = (w_i - v_i) / U_ii,  w_j -= e U_ij  for j > i in the block.

    Args:
        rest_CO: The weights as earlier blocks have left them; used up.
        upper_CC: The block's part of U, H⁻¹ = UᵀU.
        rounding: The block's grid; None: values stay floats.
        mask_CO: Bool: which weights stay; the others become zero. None: all stay.

    Returns:
        Levels, or values without a grid, and the errors e; both [C, O].
    """
    if serves(rest_CO):
        return _kernel(rest_CO, upper_CC, rounding, mask_CO, None)
    settled_CO, errors_CO = torch.empty_like(rest_CO), torch.empty_like(rest_CO)
    nearest = None if rounding is None else rounder(rounding.spec)
    keeps_CO = None if mask_CO is None else mask_CO.to(rest_CO.dtype)
    for i in range(len(rest_CO)):
        value_O = settled_O = rest_CO[i]
        if rounding is not None and nearest is not None:
            zero_O = None if rounding.zero_IO is None else rounding.zero_IO[i]
            settled_O = nearest(rest_CO[i], rounding.scale_IO[i], zero_O)
        if keeps_CO is not None:
            value_O = settled_O = settled_O * keeps_CO[i]
        if rounding is not None:
            value_O = settled_O * rounding.scale_IO[i]
        settled_CO[i] = settled_O
        row_C = upper_CC[i]
        error_O = (rest_CO[i] - value_O) / row_C[i]
        errors_CO[i] = error_O
        rest_CO[i + 1 :].addr_(row_C[i + 1 :], error_O, alpha=-1)
    return settled_CO, errors_CO


def descend(
    weight_CO: Tensor,
    error_CO: Tensor,
    slope_CO: Tensor,
    hessian_CC: Tensor,
    rounding: Rounding,
    mask_CO: Tensor | None,
) -> Tensor:
    """Takes each column's best level in turn, given all others (QuantEase, arXiv:2309.01885).

    Args:
        weight_CO: The original weights.
        error_CO: Weight less decoded weight; renewed in place.
        slope_CO: H E, the block's rows of it; used up.
        hessian_CC: The block's part of H.
        rounding: The block's grid.
        mask_CO: Bool: which weights stay zero where it is false; None: all are free.

    Returns:
        The new levels [C, O].
    """
    inverse_C = 1.0 / hessian_CC.diagonal()
    if serves(weight_CO):
        # In terms of the wanted value y_j = q_j + slope_j / H_jj, a change of column i by d
        # moves y_j by -d H_ij / H_jj: the walk of `feed_back` with another matrix.
        current_CO = weight_CO - error_CO
        wanted_CO = torch.addcmul(current_CO, slope_CO, inverse_C[:, None])
        matrix_CC = hessian_CC * -inverse_C
        level_CO, _ = _kernel(wanted_CO, matrix_CC, rounding, mask_CO, current_CO)
        torch.sub(weight_CO, level_CO * rounding.scale_IO, out=error_CO)
        return level_CO
    level_CO, nearest = torch.empty_like(weight_CO), rounder(rounding.spec)
    keeps_CO = None if mask_CO is None else mask_CO.to(weight_CO.dtype)
    for i in range(len(weight_CO)):
        # The error that column i should have, given all others, is error_i - slope_i / H_ii.
        wanted_O = weight_CO[i] - error_CO[i] + slope_CO[i] * inverse_C[i]
        zero_O = None if rounding.zero_IO is None else rounding.zero_IO[i]
        level_O = nearest(wanted_O, rounding.scale_IO[i], zero_O)
        if keeps_CO is not None:
            level_O = level_O * keeps_CO[i]
        level_CO[i] = level_O
        new_O = weight_CO[i] - level_O * rounding.scale_IO[i]
        slope_CO[i + 1 :].addr_(hessian_CC[i, i + 1 :], new_O - error_CO[i])
        error_CO[i] = new_O
    return level_CO


def _kernel(
    start_CO: Tensor,
    matrix_CC: Tensor,
    rounding: Rounding | None,
    mask_CO: Tensor | None,
    current_CO: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from pocketlm.core.column_kernel import walk

    spec, scale_CO, zero_CO = None, None, None
    if rounding is not None:
        spec, scale_CO, zero_CO = rounding.spec, rounding.scale_IO, rounding.zero_IO
    return walk(start_CO, matrix_CC, spec, scale_CO, zero_CO, mask_CO, current_CO)
