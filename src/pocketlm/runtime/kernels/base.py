"""What a kernel is: a layout of packed codes and a product y = x Wᵀ that reads it.

A kernel never keeps a dequantised copy; what it decodes is a tile that dies with the call.

Legend: M rows of activations, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pocketlm.core.activations import Codes
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.tensors import Packed, PackedInt

TILE_BYTES = 4 << 20  # of one decoded tile: it should stay in the second- or third-level cache


@dataclass(frozen=True)
class Grid:
    """Everything about a packed weight that decides which kernel takes it.

    Attributes:
        rows: O, output rows.
        columns: I, input columns.
        bits: Bits of a code, 2 to 8.
        group_size: Columns that share a scale; equal to `columns` where the row does.
        symmetric: Whether there are no zero points.
        spec: The number format where it is no integer.
        inputs: How the activations are rounded; None: not at all.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    symmetric: bool
    spec: QuantSpec | None = None
    inputs: ActivationSpec | None = None

    @classmethod
    def of(cls, weight: Packed, inputs: ActivationSpec | None = None) -> Grid:
        """The grid of a weight, and how its activations are rounded."""
        rows, columns = weight.shape
        if not isinstance(weight, PackedInt):
            spec = weight.spec
            return cls(rows, columns, spec.bits, spec.group_size or columns, True, spec, inputs)
        symmetric = weight.zero_OG is None
        return cls(rows, columns, weight.bits, weight.group_size, symmetric, None, inputs)

    @property
    def name(self) -> str:
        """The number format's name, such as ``INT4`` or ``NVFP4``."""
        return f"INT{self.bits}" if self.spec is None else self.spec.name

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.columns // self.group_size


class Kernel(Protocol):
    """One way to hold codes and multiply with them.

    Attributes:
        name: As `doctor` and messages spell it, such as ``cpu-int4``.
    """

    name: str

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot take a weight on this machine; None where it can."""
        ...

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The weight in this kernel's layout; only of a grid that it has not refused.

        Args:
            weight: Codes and scales, on the CPU.
            dtype: Of the activations to come.
            device: Where the layout lies.

        Returns:
            Named buffers.
        """
        ...

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O] with few rows: the codes are decoded inside the loop."""
        ...

    def matmul_tiles(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O] with many rows: a tile is decoded once for all of them."""
        ...


@runtime_checkable
class CodeKernel(Protocol):
    """A product of rounded activations and rounded weights that multiplies their codes.

    Attributes:
        name: As `doctor` and messages spell it.
    """

    name: str

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot take a weight on this machine; None where it can."""
        ...

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The weight in this kernel's layout; only of a grid that it has not refused."""
        ...

    def matmul_codes(self, x: Codes, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The product [M, O] in `dtype`, of activations [M, I]."""
        ...


def rows_per_tile(row_bytes: int) -> int:
    """How many rows of a decoded tile fit into `TILE_BYTES`, at least one."""
    return max(1, TILE_BYTES // row_bytes)
