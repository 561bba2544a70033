"""PyTorch's own weight-only CPU products: int4 by groups and int8 by rows, bfloat16 activations.

int4: w = (u - 8) · scale + zero with u in 0..15 and zero a float. A PackedInt's signed code c and
integer zero z fold into it as u = c + 8, zero = -scale · z. Codes of 2 and 3 bits lie in 4-bit
lanes; a group larger than 256 is split into equal ones with the same scale. The arithmetic is
float32 inside; activations, scales and results are bfloat16. For float32 activations these ops fall
to a scalar loop.

int8: w = code · scale, one scale a row, no zero points. Reads past the end of odd shapes (it
crashed on 17 x 33), so rows and columns must be whole multiples of 16 and 32.

Legend: M rows of activations, I input columns, O output rows, G groups, K columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.runtime.kernels.base import Grid, rows_per_tile

INT4_GROUPS = (256, 128, 64, 32)  # what the int4 ops take, on CPU and CUDA alike


def int4_group(group_size: int) -> int | None:
    """The largest group the int4 ops take that divides `group_size`; None if there is none."""
    return next((group for group in INT4_GROUPS if group_size % group == 0), None)


def int4_scales(weight: PackedInt, dtype: torch.dtype) -> Tensor:
    """Scales and float zero points [G, O, 2], each group split to a size the op takes."""
    scale_OG = weight.scale_OG.float()
    zero_OG = torch.zeros_like(scale_OG)
    if weight.zero_OG is not None:
        zero_OG = -scale_OG * weight.zero_OG.float()
    group = int4_group(weight.group_size) or weight.group_size
    both_OG2 = torch.stack([scale_OG, zero_OG], dim=-1)
    both_OG2 = both_OG2.repeat_interleave(weight.group_size // group, dim=1)
    return both_OG2.transpose(0, 1).to(dtype).contiguous()


class Int4Cpu:
    """aten::_weight_int4pack_mm_for_cpu."""

    name = "cpu-int4"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants bfloat16, at most 4 bits, rows by 16, groups by 32, and AVX2 or AVX-512."""
        if device.type != "cpu" or dtype is not torch.bfloat16:
            return "takes bfloat16 activations on the CPU only"
        if grid.bits > 4:
            return "takes at most 4 bits"
        if grid.rows % 16:
            return f"{grid.rows} rows are no multiple of 16"
        if int4_group(grid.group_size) is None:
            return f"groups of {grid.group_size} are no multiple of 32"
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in ("AVX2", "AVX512"):
            return f"is not vectorised for this CPU ({capability})"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Codes in the op's own order, uint8 [O, I / 2], and scales with zeros [G, O, 2]."""
        assert isinstance(weight, PackedInt)
        rows, columns = weight.codes_OI.shape
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        step = 64 * max(1, (1 << 22) // (64 * columns))  # rows at once: the op wants codes in int32
        for start in range(0, rows, step):
            unsigned = (weight.codes_OI[start : start + step] + 8).to(torch.int32)
            chunk = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
            packed[start : start + step] = chunk
        return {"packed": packed, "scale_zero_GO2": int4_scales(weight, dtype)}

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]."""
        scale_zero_GO2 = buffers["scale_zero_GO2"]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MI.contiguous(),
            buffers["packed"],
            grid.columns // scale_zero_GO2.shape[0],
            scale_zero_GO2,
        )

    def matmul_tiles(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O], some blocks of rows decoded at a time and multiplied in float32."""
        packed, scale_zero_GO2 = buffers["packed"].view(-1), buffers["scale_zero_GO2"]
        x = x_MI.float()
        y_MO = torch.empty(x_MI.shape[0], grid.rows)
        whole = grid.rows // block_rows() * block_rows()  # rows in blocks of full height
        step = max(1, rows_per_tile(grid.columns * 4) // block_rows()) * block_rows()
        for start in [*range(0, whole, step), whole]:
            stop = min(start + step, whole) if start < whole else grid.rows
            if start == stop:
                continue
            data_B = packed[start * grid.columns // 2 : stop * grid.columns // 2]
            tile_IR = _decode(data_B, scale_zero_GO2[:, start:stop], grid.columns)
            torch.mm(x, tile_IR, out=y_MO[:, start:stop])
        return y_MO.to(x_MI.dtype)


def _decode(data_B: Tensor, scale_zero_GR2: Tensor, columns: int) -> Tensor:
    """Whole blocks of the op's layout, or the short last one, transposed: float32 [I, R]."""
    rows, block = scale_zero_GR2.shape[1], block_rows()
    tile_IR = torch.empty(columns, rows)
    if rows % block == 0:  # N blocks; a byte holds rows r and r + block / 2
        data_INb = data_B.view(-1, columns, block // 2).transpose(0, 1)
        low, high = tile_IR.view(columns, -1, 2, block // 2).unbind(2)
    else:  # a byte holds rows 2r and 2r + 1
        data_INb = data_B.view(columns, -1)
        low, high = tile_IR.view(columns, -1, 2).unbind(2)
    low.copy_(data_INb & 15)
    high.copy_(data_INb >> 4)
    scale_G1R, zero_G1R = scale_zero_GR2[:, None].float().unbind(-1)
    tile_GgR = tile_IR.view(scale_zero_GR2.shape[0], -1, rows)
    tile_GgR.mul_(scale_G1R.contiguous()).add_(zero_G1R - 8.0 * scale_G1R)
    return tile_IR


@lru_cache(maxsize=1)
def block_rows() -> int:
    """Rows of one block of the int4 layout."""
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


class Int8Cpu:
    """aten::_weight_int8pack_mm."""

    name = "cpu-int8"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants bfloat16, symmetric codes, one scale a row, and round shapes."""
        if device.type != "cpu" or dtype is not torch.bfloat16:
            return "takes bfloat16 activations on the CPU only"
        if not grid.symmetric or grid.groups != 1:
            return "takes symmetric codes with one scale a row only"
        if grid.bits <= 4:
            return "would hold narrow codes in 8 bits"
        if grid.rows % 16 or grid.columns % 32:
            return f"{grid.rows} x {grid.columns} is no multiple of 16 x 32"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Codes int8 [O, I] and scales [O]."""
        assert isinstance(weight, PackedInt)
        return {
            "codes_OI": weight.codes_OI,
            "scale_O": weight.scale_OG[:, 0].to(dtype).contiguous(),
        }

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]."""
        return torch.ops.aten._weight_int8pack_mm(
            x_MI.contiguous(), buffers["codes_OI"], buffers["scale_O"]
        )

    matmul_tiles = matmul
