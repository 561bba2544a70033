"""PyTorch's own weight-only CUDA product: int4 by groups (tinygemm), bfloat16 activations.

The grid folds as on the CPU (cpu.py): w = (u - 8) · scale + zero, zero = -scale · z. The packing op
takes uint8 [O, I / 2] with the even column in the high half of a byte, and orders codes by tiles of
16 · k columns, k in 2, 4, 8. Compute capability 8.0 or later.

Legend: M rows of activations, I input columns, O output rows, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.cpu import int4_group, int4_scales


def inner_tiles(columns: int) -> int | None:
    """The largest inner tile count, of 8, 4 and 2, that divides the columns; else None."""
    return next((count for count in (8, 4, 2) if columns % (16 * count) == 0), None)


class Int4Cuda:
    """aten::_weight_int4pack_mm."""

    name = "cuda-int4"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants bfloat16, at most 4 bits, rows by 8, groups by 32, and an Ampere card or later."""
        if device.type != "cuda" or dtype is not torch.bfloat16:
            return "takes bfloat16 activations on CUDA only"
        if grid.bits > 4:
            return "takes at most 4 bits"
        if grid.rows % 8:
            return f"{grid.rows} rows are no multiple of 8"
        if int4_group(grid.group_size) is None or inner_tiles(grid.columns) is None:
            return f"groups of {grid.group_size} are no multiple of 32"
        if torch.version.cuda is None:
            return "is built for NVIDIA cards"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Codes, int32 [O/8, I/(16k), 32, k/2], and scales with zeros [G, O, 2]."""
        assert isinstance(weight, PackedInt)
        unsigned = (weight.codes_OI + 8).to(torch.uint8).to(device)
        pairs = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
        tiles = inner_tiles(weight.codes_OI.shape[1])
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        return {"packed": packed, "scale_zero_GO2": int4_scales(weight, dtype).to(device)}

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]."""
        scale_zero_GO2 = buffers["scale_zero_GO2"]
        group = grid.columns // scale_zero_GO2.shape[0]
        return torch.ops.aten._weight_int4pack_mm(
            x_MI.contiguous(), buffers["packed"], group, scale_zero_GO2
        )

    matmul_tiles = matmul
