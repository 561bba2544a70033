"""Mean and spread of each input column. Legend: T tokens, I input columns."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from pocketlm.core.stats import Stat


class Moments(Stat):
    """Sums of inputs and of their squares, float64 [I]."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum_I = torch.zeros(columns, dtype=torch.float64, device=self.device)
        self._square_I = torch.zeros(columns, dtype=torch.float64, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns).double()
        self.tokens += x_TI.shape[0]
        self._sum_I += x_TI.sum(0)
        self._square_I += x_TI.square().sum(0)

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._sum_I += other._sum_I
        self._square_I += other._square_I
        self.tokens += other.tokens

    def mean_I(self) -> Tensor:
        """The mean of each column; zeros where no token was seen."""
        return self._sum_I / max(self.tokens, 1)

    def variance_I(self) -> Tensor:
        """The sample variance of each column."""
        centred_I = self._square_I - self.tokens * self.mean_I().square()
        return centred_I.clamp_min(0) / max(self.tokens - 1, 1)

    def norm_I(self) -> Tensor:
        """The root of each column's summed squares."""
        return self._square_I.sqrt()
