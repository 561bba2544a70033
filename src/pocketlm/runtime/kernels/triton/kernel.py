"""Our Triton products as a kernel of the table: weights of 2 to 8 bits, 16-bit activations.

Needs Triton's explicit layouts (Gluon, from Triton 3.6) and an NVIDIA card from compute capability
8.0; the product for many rows needs Hopper. Without them the kernel says so and others serve.

Legend as in layout.py; M rows of activations, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.triton.layout import (
    lane_bits,
    pack_groups,
    pack_planes,
    unit_columns,
)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """What is missing to compile the kernels here; None if nothing."""
    try:
        from pocketlm.runtime.kernels.triton import decode, prefill  # noqa: F401
    except ImportError as error:
        return f"needs Triton 3.6 or later ({error})"
    return None


class TritonWeights:
    """Decode and prefill products from one layout."""

    name = "triton"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants integers, bfloat16 or float16, groups by 32, an NVIDIA card from Ampere on."""
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return "takes bfloat16 and float16 activations on CUDA only"
        if unit_columns(lane_bits(grid.bits, grid.group_size), grid.group_size) == 0:
            return f"groups of {grid.group_size} are no multiple of 32"
        if torch.version.cuda is None:
            return "is built for NVIDIA cards"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0"
        return missing()

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Planes of codes [T, C, words], scales [T, G, 16], zero points int8 [T, G, 16]."""
        assert isinstance(weight, PackedInt)
        width = lane_bits(weight.bits, weight.group_size)
        unit = unit_columns(width, weight.group_size)
        planes = pack_planes(weight.codes_OI.to(device), width, unit)
        buffers = {"codes": planes[0].view(torch.int16)}
        if width == 3:
            buffers["high_bits"] = planes[1].view(torch.int16)
        buffers["scale"] = pack_groups(weight.scale_OG.to(device))
        if weight.zero_OG is not None:
            buffers["zero"] = pack_groups(weight.zero_OG.to(device))
        return buffers

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]."""
        return decode_product(x_MI, buffers, grid)

    matmul_tiles = matmul


def decode_product(
    x_MI: Tensor,
    buffers: Mapping[str, Tensor],
    grid: Grid,
    *,
    row_tiles: int = 1,
    units: int = 0,
    warps: int = 4,
    early: bool | None = None,
) -> Tensor:
    """y [M, O] for few rows M; see decode.py.

    Args:
        x_MI: Activations, their columns contiguous.
        buffers: What `TritonWeights.pack` made.
        grid: The weight's.
        row_tiles: R, tiles of 16 outputs that a program makes.
        units: C, units that a warp takes in a step; 0: up to 16 bytes twice, within a group.
        warps: That share a row of the weight.
        early: Whether a program may start before the kernel before it has ended; None: on Hopper.
    """
    from pocketlm.runtime.kernels.triton.decode import decode_kernel

    tokens = x_MI.shape[0]
    width = lane_bits(grid.bits, grid.group_size)
    unit = unit_columns(width, grid.group_size)
    units = units or (2 if grid.group_size % (2 * unit) == 0 and width != 3 else 1)
    if early is None:
        early = torch.cuda.get_device_capability(x_MI.device) >= (9, 0)
    y_MO = torch.empty(tokens, grid.rows, dtype=x_MI.dtype, device=x_MI.device)
    codes, scale = buffers["codes"], buffers["scale"]
    tiles, count = -(-grid.rows // 16), grid.columns // unit
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    decode_kernel[(-(-tiles // row_tiles),)](
        x_MI, codes, buffers.get("high_bits", codes), scale, buffers.get("zero", scale), y_MO,
        tokens, grid.columns, grid.rows, count, grid.groups, grid.group_size // (units * unit),
        x_MI.stride(0), grid.rows,
        WIDTH=width, UNIT=unit, ZEROS="zero" in buffers, EVEN=count % (units * warps) == 0,
        R=row_tiles, C=units, W=warps, N=max(8, 1 << (tokens - 1).bit_length()), PDL=early,
        num_warps=warps, **options,
    )  # fmt: skip
    return y_MO


def prefill_product(
    x_MI: Tensor,
    buffers: Mapping[str, Tensor],
    grid: Grid,
    *,
    tokens: int = 64,
    units: int = 1,
    warps: int = 4,
    stages: int = 4,
) -> Tensor:
    """y [M, O] for many rows M; see prefill.py.

    Args:
        x_MI: Activations, their columns contiguous.
        buffers: What `TritonWeights.pack` made.
        grid: The weight's.
        tokens: N, activations of a tile.
        units: C, units of a step.
        warps: 4 or 8, each with 16 rows of the weight.
        stages: Of the ring in shared memory.
    """
    from pocketlm.runtime.kernels.triton.prefill import prefill_kernel

    width = lane_bits(grid.bits, grid.group_size)
    unit = unit_columns(width, grid.group_size)
    rows = x_MI.shape[0]
    y_MO = torch.empty(rows, grid.rows, dtype=x_MI.dtype, device=x_MI.device)
    codes, scale = buffers["codes"], buffers["scale"]
    prefill_kernel[(-(-grid.rows // (16 * warps)), -(-rows // tokens))](
        x_MI, codes, buffers.get("high_bits", codes), scale, buffers.get("zero", scale), y_MO,
        rows, grid.rows, grid.columns // unit, grid.groups, grid.group_size // (units * unit),
        x_MI.stride(0), grid.rows,
        WIDTH=width, UNIT=unit, ZEROS="zero" in buffers, C=units, W=warps, N=tokens,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y_MO
