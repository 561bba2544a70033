"""A weight whose columns lie in another order than the inputs: activation order as others store it.

GPTQ with ``desc_act`` and without static groups cuts its groups from columns sorted by importance,
so that a group's columns lie scattered. Sorted by group they are an ordinary weight again, whose
inputs must be brought into the same order.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt


@dataclass(frozen=True)
class Permuted:
    """Codes whose column j belongs to input ``order_I[j]``.

    Attributes:
        values: The weight with its columns sorted by group.
        order_I: int64, a permutation of the columns.
    """

    values: PackedInt
    order_I: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values.shape

    @property
    def spec(self) -> QuantSpec:
        """The grid; the order is no part of it."""
        return self.values.spec

    @property
    def is_finite(self) -> bool:
        """Whether every scale is a number."""
        return self.values.is_finite

    @property
    def stored_bits(self) -> int:
        """Stored bits: codes, scales, zero points, and 32 for each column's group."""
        return self.values.stored_bits + 32 * self.order_I.numel()

    @property
    def group_of_I(self) -> Tensor:
        """int32 [I]: the group of each column of the weight, ``g_idx`` of GPTQ."""
        group_I = torch.arange(self.order_I.numel(), device=self.order_I.device)
        group_I = (group_I // self.values.group_size).to(torch.int32)
        return torch.empty_like(group_I).scatter_(0, self.order_I, group_I)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] in the order of the inputs."""
        sorted_OI = self.values.dequantize(dtype)
        return torch.empty_like(sorted_OI).index_copy_(1, self.order_I, sorted_OI)

    def to(self, device: torch.device | str) -> Permuted:
        """The same weight on a device."""
        return Permuted(self.values.to(device), self.order_I.to(device))


def sort_by_group(packed: PackedInt, group_of_I: Tensor) -> PackedInt | Permuted:
    """A weight from codes in the order of the inputs and the group of each column.

    Args:
        packed: Codes in the order of the inputs; scales and zero points [O, G].
        group_of_I: The group of each column, from 0 to G - 1, each of I / G columns.

    Returns:
        `packed` itself where each group's columns are neighbours, in order.

    Raises:
        ValueError: If a column's group does not exist, or groups differ in width.
    """
    columns, groups = packed.shape[1], packed.scale_OG.shape[1]
    group_I = group_of_I.long()
    if tuple(group_I.shape) != (columns,) or not bool(((group_I >= 0) & (group_I < groups)).all()):
        raise ValueError(f"does not name one of {groups} groups for each of {columns} columns")
    widths_G = torch.bincount(group_I, minlength=groups)
    if bool((widths_G != packed.group_size).any()):
        low, high = int(widths_G.min()), int(widths_G.max())
        raise ValueError(f"has groups of {low} to {high} columns, not of {packed.group_size} each")
    order_I = torch.argsort(group_I, stable=True)
    if bool((order_I[1:] > order_I[:-1]).all()):
        return packed
    codes_OI = packed.codes_OI[:, order_I].contiguous()
    return Permuted(PackedInt(codes_OI, packed.scale_OG, packed.zero_OG, packed.bits), order_I)
