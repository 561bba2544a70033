"""The ways a compressed weight is held. `.dequantize()` is the oracle of every kernel and format.

Legend: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pocketlm.core.levels import levels_of
from pocketlm.core.scales import Scale
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import DenseSpec, SparseSpec, WeightSpec


class WeightTensor(Protocol):
    """One linear's weight in some form: all the engine knows of it; formats choose by `spec`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    @property
    def spec(self) -> WeightSpec:
        """In what form it is."""
        ...

    @property
    def is_finite(self) -> bool:
        """Whether everything in it is a number."""
        ...

    @property
    def stored_bits(self) -> int:
        """Stored bits, everything counted."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] in `dtype`."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same weight on a device."""
        ...


@dataclass(frozen=True)
class Dense:
    """An ordinary weight, `weight_OI`, in the dtype it is stored in.

    Attributes:
        weight_OI: The values.
        transposed: Whether a file holds them as [I, O] (GPT-2).
    """

    weight_OI: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.weight_OI.shape
        return rows, columns

    @property
    def spec(self) -> DenseSpec:
        """The dtype."""
        name: Any = str(self.weight_OI.dtype).removeprefix("torch.")
        return DenseSpec(dtype=name, transposed=self.transposed)

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number."""
        return bool(torch.isfinite(self.weight_OI).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] in `dtype`."""
        return self.weight_OI.to(dtype)

    def to(self, device: torch.device | str) -> Dense:
        """The same weight on a device."""
        return replace(self, weight_OI=self.weight_OI.to(device))

    @property
    def stored_bits(self) -> int:
        """Stored bits, everything counted."""
        return self.weight_OI.numel() * self.weight_OI.element_size() * 8


@dataclass(frozen=True)
class PackedInt:
    """Integer codes with a scale, and perhaps a zero point, for each group of a row's columns.

    w[o, i] = scale[o, g] * (code[o, i] - zero[o, g]),  g = i // (I / G)

    Attributes:
        codes_OI: int8, from -2^(bits-1) to 2^(bits-1)-1.
        scale_OG: In the dtype it is stored in; may be negative.
        zero_OG: int8 in the same range as the codes; None where the grid is symmetric.
        bits: Bits of a code, 2 to 8.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.codes_OI.shape
        return rows, columns

    @property
    def group_size(self) -> int:
        """Columns that share a scale; I where the whole row does."""
        return self.codes_OI.shape[1] // self.scale_OG.shape[1]

    @property
    def spec(self) -> QuantSpec:
        """The grid."""
        group_size = None if self.scale_OG.shape[1] == 1 else self.group_size
        symmetric = self.zero_OG is None
        return QuantSpec(bits=self.bits, symmetric=symmetric, group_size=group_size)

    @property
    def is_finite(self) -> bool:
        """Whether every scale is a number."""
        return bool(torch.isfinite(self.scale_OG).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]; the product is rounded once, in `dtype`."""
        rows, columns = self.codes_OI.shape
        codes_OGi = self.codes_OI.to(dtype).view(rows, self.scale_OG.shape[1], -1)
        if self.zero_OG is not None:
            codes_OGi = codes_OGi - self.zero_OG.to(dtype)[:, :, None]
        return (codes_OGi * self.scale_OG.to(dtype)[:, :, None]).view(rows, columns)

    def to(self, device: torch.device | str) -> PackedInt:
        """The same weight on a device."""
        zero_OG = None if self.zero_OG is None else self.zero_OG.to(device)
        return PackedInt(self.codes_OI.to(device), self.scale_OG.to(device), zero_OG, self.bits)

    @property
    def stored_bits(self) -> int:
        """Stored bits: codes, scales and zero points."""
        scale_bits = self.scale_OG.numel() * self.scale_OG.element_size() * 8
        zero_bits = 0 if self.zero_OG is None else self.zero_OG.numel() * self.bits
        return self.codes_OI.numel() * self.bits + scale_bits + zero_bits


@dataclass(frozen=True)
class PackedFloat:
    """Codes that are no plain integers, with a scale for each tile: FP8, MXFP4, NF4, Q4_K …

    w[o, i] = scale[o // group_rows, i // group_size] * level(code[o, i]), in llama.cpp's formats
    without a zero point less a minimum of the tile.

    Attributes:
        codes_OI: uint8, the bit pattern of each level, one in a byte.
        scale: The scales, as stored.
        spec: What the codes stand for, and the tiles.
    """

    codes_OI: Tensor
    scale: Scale
    spec: QuantSpec

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.codes_OI.shape
        return rows, columns

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.spec.bits

    @property
    def is_finite(self) -> bool:
        """Whether every scale is a number, and every code one too (E4M3 has a NaN)."""
        scales = bool(torch.isfinite(self.scale.values_RG()).all())
        minima = self.scale.minima()
        if minima is not None:
            return scales and bool(torch.isfinite(minima).all())
        return scales and (self.bits < 8 or not bool(((self.codes_OI & 0x7F) == 0x7F).any()))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]; the product is rounded in float32 and then to `dtype`."""
        return self.rows(0, self.codes_OI.shape[0], dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of the weight, [stop - start, I], without decoding the others."""
        codes_oI = self.codes_OI[start:stop]
        return decode_rows(codes_oI, start, self.scale, self.spec, dtype, self.shape[0])

    def to(self, device: torch.device | str) -> PackedFloat:
        """The same weight on a device."""
        scale = self.scale.map(lambda tensor: tensor.to(device))
        return PackedFloat(self.codes_OI.to(device), scale, self.spec)

    @property
    def stored_bits(self) -> int:
        """Stored bits: codes, scales and what the scales share."""
        return self.codes_OI.numel() * self.bits + self.scale.stored_bits


def decode_rows(
    codes_oI: Tensor,
    start: int,
    scale: Scale,
    spec: QuantSpec,
    dtype: torch.dtype,
    rows_in_all: int,
) -> Tensor:
    """Rows of a weight from their codes.

    Args:
        codes_oI: uint8, the codes of rows `start` and following.
        start: The first row.
        scale: The scales of the whole weight.
        spec: Number format and tiles.
        dtype: Of the result.
        rows_in_all: O.

    Returns:
        The rows [o, I].
    """
    work = torch.promote_types(dtype, torch.float32)
    rows, columns = codes_oI.shape
    height = spec.group_rows or rows_in_all
    first, last = start // height, -(-(start + rows) // height)
    scale_oG = scale.rows(first, last).to(work)
    if height > 1:
        below = torch.arange(start, start + rows, device=codes_oI.device) // height - first
        scale_oG = scale_oG[below]
    weight_oI = levels_of(codes_oI, spec).to(work)
    width = spec.group_size or columns
    if columns % width == 0:
        weight_oGi = weight_oI.view(rows, -1, width).mul_(scale_oG[:, :, None])
        minimum_oG = scale.minima(first, last)
        if minimum_oG is not None:
            weight_oGi.sub_(minimum_oG.to(work)[:, :, None])
        return weight_oGi.view(rows, columns).to(dtype)
    return weight_oI.mul_(scale_oG.repeat_interleave(width, 1)[:, :columns]).to(dtype)


Packed = PackedInt | PackedFloat


@dataclass(frozen=True)
class Sparse:
    """A weight of which only what a mask keeps is stored.

    Attributes:
        values: The whole weight; it decodes to zero wherever the mask keeps nothing.
        mask_OI: Bool, true for what is kept.
        pattern: (N, M) where each M neighbours of a row keep N; None: any.
    """

    values: Dense | Packed
    mask_OI: Tensor
    pattern: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values.shape

    @property
    def spec(self) -> SparseSpec:
        """Form of the values and of the mask."""
        kept = int(self.mask_OI.sum())
        return SparseSpec(values=self.values.spec, kept=kept, pattern=self.pattern)

    @property
    def is_finite(self) -> bool:
        """Whether every value and scale is a number."""
        return self.values.is_finite

    @property
    def stored_bits(self) -> int:
        """Stored bits: kept values, scales, mask."""
        spec = self.spec
        absent = self.mask_OI.numel() - spec.kept
        return self.values.stored_bits - absent * spec.bits + spec.mask_bits(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] in `dtype`."""
        return self.values.dequantize(dtype)

    def to(self, device: torch.device | str) -> Sparse:
        """The same weight on a device."""
        return replace(self, values=self.values.to(device), mask_OI=self.mask_OI.to(device))
