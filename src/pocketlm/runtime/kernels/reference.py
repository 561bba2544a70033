"""The truth of every other kernel: plain torch, any number format, any group, any device.

Codes lie packed as densely as on disk (formats/packing.py). Each call decodes a few rows to the
activations' dtype, w = scale · (level - zero) as `dequantize()` rounds it, multiplies, and drops
them. Slow where few activations meet many weights: the decoding is not hidden by anything.

Legend: M rows of activations, I input columns, O output rows; a row has G groups and W words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.scales import Scale
from pocketlm.core.tensors import Packed, PackedInt, decode_rows
from pocketlm.formats.packing import pack, pack_bytes, unpack, unpack_bytes
from pocketlm.runtime.kernels.base import Grid, rows_per_tile

SCALE_BUFFERS = {
    "scale_RG": "stored_RG",
    "outer": "outer",
    "offset": "offset",
    "minimum_RG": "minimum_RG",
    "outer_minimum": "outer_minimum",
}
"""Name of a buffer → field of the scales, in the order of the fields."""


class Reference:
    """Decodes rows, multiplies, forgets."""

    name = "reference"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Nothing is refused."""
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Words [O, W] or bytes [O, B], scales as stored, zero points [O, G] if there are any."""
        if not isinstance(weight, PackedInt):
            named = {name: getattr(weight.scale, part) for name, part in SCALE_BUFFERS.items()}
            buffers = {name: kept.to(device) for name, kept in named.items() if kept is not None}
            buffers["bytes_OB"] = pack_bytes(weight.codes_OI, weight.bits).to(device)
            return buffers
        buffers = {
            "words_OW": pack(weight.codes_OI, weight.bits).to(device),
            "scale_OG": weight.scale_OG.to(device),
        }
        if weight.zero_OG is not None:
            buffers["zero_OG"] = weight.zero_OG.to(device)
        return buffers

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O], some rows of W at a time."""
        y_MO = x_MI.new_empty(x_MI.shape[0], grid.rows)
        step = rows_per_tile(grid.columns * x_MI.element_size())
        for start in range(0, grid.rows, step):
            tile_oI = self._tile(buffers, grid, start, start + step, x_MI.dtype)
            torch.mm(x_MI, tile_oI.T, out=y_MO[:, start : start + step])
        return y_MO

    matmul_tiles = matmul

    def _tile(
        self,
        buffers: Mapping[str, Tensor],
        grid: Grid,
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Rows start to stop of the weight, in `dtype`."""
        spec = grid.spec
        if spec is None:
            return self.decode(buffers, grid, start, stop).dequantize(dtype)
        codes_oI = unpack_bytes(buffers["bytes_OB"][start:stop], spec.bits)
        rest = [buffers.get(name) for name in list(SCALE_BUFFERS)[1:]]
        scale = Scale(spec.scale, buffers["scale_RG"], *rest)
        return decode_rows(codes_oI, start, scale, spec, dtype, grid.rows)

    def decode(self, buffers: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> PackedInt:
        """Rows start to stop of integers as codes and scales again."""
        zero_OG = buffers.get("zero_OG")
        return PackedInt(
            unpack(buffers["words_OW"][start:stop], grid.bits, grid.columns),
            buffers["scale_OG"][start:stop],
            None if zero_OG is None else zero_OG[start:stop],
            grid.bits,
        )
