"""Minitron (arXiv:2407.14679): how large a unit's activations are.

    score_u = √ Σ_b ( mean_t |x_btu|₂ )²

the norm over a head's columns (a channel's magnitude), the mean over a sequence's tokens and the
L2 norm over sequences: the aggregation that the paper finds best. Without its distillation.
Legend: B sequences, T tokens, I input columns, U units.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from pocketlm.core.stats import Stat
from pocketlm.core.transform import Structure
from pocketlm.core.views import LinearView
from pocketlm.prune.width import InputWidth


class UnitSizes(Stat):
    """Σ over sequences of the squared mean size of each unit, float64 [U].

    Args:
        columns: I.
        device: Where it is gathered.
        width: Neighbouring columns of a unit.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", width: int = 1) -> None:
        super().__init__(columns, device)
        self._width = width
        self._sum_U = torch.zeros(columns // width, dtype=torch.float64, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes sequences [B, T, I]; tokens without sequences [T, I] count as one."""
        x_BTI = x_TI.detach() if x_TI.dim() == 3 else x_TI.detach().reshape(1, -1, self.columns)
        if not x_BTI.shape[1]:
            return
        self.tokens += x_BTI.shape[0] * x_BTI.shape[1]
        size_BTU = x_BTI.unflatten(-1, (-1, self._width)).float().norm(dim=-1)
        self._sum_U += size_BTU.mean(1).double().square().sum(0)

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._sum_U += other._sum_U
        self.tokens += other.tokens

    def value_U(self) -> Tensor:
        """The score."""
        return self._sum_U.sqrt()


class Minitron(InputWidth):
    """Minitron-style: keeps heads and channels whose activations are large."""

    needs: ClassVar[tuple[type[Stat], ...]] = (UnitSizes,)

    def statistic(self, width: int, columns: int, device: torch.device) -> Stat:
        """Sizes of the units."""
        return UnitSizes(columns, device, width)

    def scores(self, structure: Structure, reader: LinearView, stat: UnitSizes) -> Tensor:
        """The mean size of the unit's activations."""
        copies = structure.cut_of(reader.tensor_name).copies
        return stat.value_U().reshape(copies, structure.units).sum(0)
