"""The ways a compressed weight is held. `.dequantize()` is the oracle of every kernel and format.

Legend: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """An ordinary weight, `weight_OI`."""

    weight_OI: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] in `dtype`."""
        return self.weight_OI.to(dtype)

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
    def group_size(self) -> int:
        """Columns that share a scale; I where the whole row does."""
        return self.codes_OI.shape[1] // self.scale_OG.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]; the product is rounded once, in `dtype`."""
        rows, columns = self.codes_OI.shape
        codes_OGi = self.codes_OI.to(dtype).view(rows, self.scale_OG.shape[1], -1)
        if self.zero_OG is not None:
            codes_OGi = codes_OGi - self.zero_OG.to(dtype)[:, :, None]
        return (codes_OGi * self.scale_OG.to(dtype)[:, :, None]).view(rows, columns)

    @property
    def stored_bits(self) -> int:
        """Stored bits: codes, scales and zero points."""
        scale_bits = self.scale_OG.numel() * self.scale_OG.element_size() * 8
        zero_bits = 0 if self.zero_OG is None else self.zero_OG.numel() * self.bits
        return self.codes_OI.numel() * self.bits + scale_bits + zero_bits


WeightTensor = Dense | PackedInt
