"""Exact float32 products from 2, 4 or 8 bit codes on x86, by PyTorch's quantized embedding bags.

A weighted embedding bag is a matrix-vector product: Σ_k x[k] · table[k, :]. With the columns of W
as the table's rows, and one bag for each group of columns, FBGEMM's vectorised kernel gives

    part[g, o] = Σ_{k in g} x[k] · code[o, k]
    y[o] = Σ_g scale[o, g] · (part[g, o] - zero[o, g] · Σ_{k in g} x[k])

all in float32, for any group size. 3 bits lie in 4-bit lanes, 5 to 7 in 8-bit ones. Output rows go
in blocks so that the kernel's accumulators stay in registers. PyTorch's int4 product is vectorised
for bfloat16 only; its float32 form is a hundred times slower than this.

Legend: M rows of activations, I input columns, O output rows, G groups, N blocks of R rows,
B bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.runtime.kernels.base import Grid, rows_per_tile

BLOCK_ROWS = 256  # fastest of 64 to 4096 on 4096 x 4096 (Xeon of the Cascade Lake kind, 2026-11)
_PRODUCTS = {
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
}
_UNPACK = {
    2: torch.ops.quantized.embedding_bag_2bit_unpack,
    4: torch.ops.quantized.embedding_bag_4bit_unpack,
    8: torch.ops.quantized.embedding_bag_byte_unpack,
}


def lane_bits(bits: int) -> int:
    """The width a code is held in: 2, 4 or 8 bits."""
    return next(width for width in (2, 4, 8) if bits <= width)


def block_shape(rows: int) -> tuple[int, int]:
    """Number of blocks and rows of each; the last one is filled up with zeros."""
    blocks = -(-rows // BLOCK_ROWS)
    return blocks, -(-rows // (blocks * 16)) * 16


class Bags:
    """Weighted embedding bags over the columns of W."""

    name = "cpu-bags"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Refuses everything but x86 CPUs with FBGEMM."""
        if device.type != "cpu":
            return "runs on the CPU only"
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"is not vectorised on {platform.machine()}"
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return "this PyTorch is built without FBGEMM"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Table [N·I, B]: the codes of one block and column, then its scale 1 and offset.

        Scales and zero points become [N, G, R], in the dtype they are stored in.
        """
        assert isinstance(weight, PackedInt)
        blocks, block = block_shape(weight.codes_OI.shape[0])
        lane = lane_bits(weight.bits)
        offset = 1 << (lane - 1)
        columns = weight.codes_OI.shape[1]
        codes_NIR = _blocked(weight.codes_OI, blocks, block).view(-1, block)
        unsigned = (codes_NIR.to(torch.int16) + offset).to(torch.uint8)
        per_byte = 8 // lane
        rows_B = unsigned[:, 0::per_byte].clone()
        for position in range(1, per_byte):
            rows_B |= unsigned[:, position::per_byte] << (position * lane)
        affine_dtype = torch.float32 if lane == 8 else torch.float16  # FBGEMM's row formats
        affine = torch.tensor([1.0, -float(offset)], dtype=affine_dtype).view(torch.uint8)
        table = torch.cat([rows_B, affine.expand(blocks * columns, -1)], dim=1)
        buffers = {"table": table, "scale_NGR": _blocked(weight.scale_OG, blocks, block)}
        if weight.zero_OG is not None:
            buffers["zero_NGR"] = _blocked(weight.zero_OG, blocks, block)
        return buffers

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]: float32 inside, rounded once to the activations' dtype."""
        rows_M = x_MI.shape[0]
        blocks, block = block_shape(grid.rows)
        x = x_MI if x_MI.dtype is torch.float32 else x_MI.float()
        spread = x.expand(blocks, rows_M, grid.columns) if blocks > 1 else x
        columns_at, bag_ends = _bags(blocks, rows_M, grid.columns, grid.group_size)
        part_NMGR = _PRODUCTS[lane_bits(grid.bits)](
            buffers["table"], columns_at, bag_ends, False, 0, False, spread.reshape(-1), None, True
        ).view(blocks, rows_M, grid.groups, block)
        zero_NGR = buffers.get("zero_NGR")
        if zero_NGR is not None:
            sums_MG = x.view(rows_M, grid.groups, grid.group_size).sum(-1)
            part_NMGR -= sums_MG[None, :, :, None] * zero_NGR[:, None]
        y_NMR = (part_NMGR.mul_(buffers["scale_NGR"][:, None])).sum(2)
        y_MO = y_NMR.view(1, -1) if rows_M == 1 else y_NMR.transpose(0, 1).reshape(rows_M, -1)
        return y_MO[:, : grid.rows].to(x_MI.dtype)

    def matmul_tiles(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O], one block of rows decoded at a time, in float32."""
        blocks, block = block_shape(grid.rows)
        x = x_MI.float()
        y_MO = x.new_empty(x_MI.shape[0], grid.rows)
        # A block of many columns is decoded in slices of whole groups.
        step = max(1, rows_per_tile(block * 4) // grid.group_size) * grid.group_size
        for index in range(blocks):
            first = index * block
            y_MR = y_MO[:, first : first + block]
            for start in range(0, grid.columns, step):
                stop = min(start + step, grid.columns)
                tile_iR = self._decode(buffers, grid, index, start, stop)[:, : y_MR.shape[1]]
                if start == 0:
                    torch.mm(x[:, start:stop], tile_iR, out=y_MR)
                else:
                    y_MR.addmm_(x[:, start:stop], tile_iR)
        return y_MO.to(x_MI.dtype)

    def _decode(
        self, buffers: Mapping[str, Tensor], grid: Grid, block: int, start: int, stop: int
    ) -> Tensor:
        """Some columns of one block's rows, transposed: float32 [stop - start, R]."""
        base, group = block * grid.columns, grid.group_size
        codes_iR = _UNPACK[lane_bits(grid.bits)](buffers["table"][base + start : base + stop])
        codes_GgR = codes_iR.view(-1, group, codes_iR.shape[1])
        groups = slice(start // group, stop // group)
        zero_NGR = buffers.get("zero_NGR")
        if zero_NGR is not None:
            codes_GgR -= zero_NGR[block, groups, None].float()
        codes_GgR *= buffers["scale_NGR"][block, groups, None].float()
        return codes_iR


def _blocked(matrix_OX: Tensor, blocks: int, block: int) -> Tensor:
    """[O, X] → contiguous [N, X, R], filled up with zeros."""
    missing = blocks * block - matrix_OX.shape[0]
    if missing:
        matrix_OX = torch.cat([matrix_OX, matrix_OX.new_zeros(missing, matrix_OX.shape[1])])
    return matrix_OX.view(blocks, block, -1).transpose(1, 2).contiguous()


def _bags(blocks: int, rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Which table row each weight multiplies, and where bags end; kept for the one-row product."""
    if rows == 1:
        return _bags_of_one_row(blocks, columns, group_size)
    return _make_bags(blocks, rows, columns, group_size)


def _make_bags(blocks: int, rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(blocks * columns, dtype=torch.int32).view(blocks, 1, columns)
    ends = torch.arange(0, blocks * rows * columns + 1, group_size, dtype=torch.int32)
    return at.expand(blocks, rows, columns).reshape(-1), ends


@lru_cache(maxsize=32)
def _bags_of_one_row(blocks: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    return _make_bags(blocks, 1, columns, group_size)
