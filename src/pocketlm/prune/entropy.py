"""How much a channel tells: the entropy of its values over tokens, for E-Sparse.

Deviation: values are sorted into 64 bins over the range that the first batch shows; E-Sparse
(arXiv:2310.15929) bins over the range of all tokens, which a stream does not know beforehand.

Legend: T tokens, I input columns.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from pocketlm.core.stats import Stat

BINS = 64


class Entropy(Stat):
    """The entropy of each input channel over the tokens, in nats."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._counts_IB = torch.zeros(columns, BINS, device=self.device)
        self._low_I: Tensor | None = None
        self._width_I = torch.ones(columns, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns).float()
        if not x_TI.shape[0]:
            return
        if self._low_I is None:
            low_I, high_I = torch.aminmax(x_TI, dim=0)
            self._low_I = low_I
            self._width_I = ((high_I - low_I) / BINS).clamp(min=torch.finfo(torch.float32).tiny)
        place_TI = ((x_TI - self._low_I) / self._width_I).clamp_(0, BINS - 1).long()
        self._counts_IB.scatter_add_(1, place_TI.T, torch.ones_like(x_TI.T))
        self.tokens += x_TI.shape[0]

    def merge(self, other: Self) -> None:
        """Adds another's counts; both are taken to have the same bins."""
        if self._low_I is None:
            self._low_I, self._width_I = other._low_I, other._width_I
        self._counts_IB += other._counts_IB
        self.tokens += other.tokens

    def value_I(self) -> Tensor:
        """The entropy [I] in nats; zeros where no token was seen."""
        share_IB = self._counts_IB / max(self.tokens, 1)
        return -torch.special.xlogy(share_IB, share_IB).sum(1)
