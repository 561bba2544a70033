"""What is gathered of a linear's inputs while calibration data flows: add, merge, finalize.

Legend: T tokens, I input columns.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from pocketlm.core.linalg import InverseFactor, inverse_factor

PANEL = 192  # columns of a panel of the Gram matrix; those above the diagonal are not computed


class Stat:
    """A running statistic over the inputs of a group of linears.

    Args:
        columns: I, the width of the inputs.
        device: Where it is gathered.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.device, self.tokens = columns, torch.device(device), 0

    def add(self, x_TI: Tensor) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        raise NotImplementedError

    def merge(self, other: Self) -> None:
        """Takes over what another rank or pass has gathered."""
        raise NotImplementedError


class Hessian(Stat):
    """H = (2 / T) XᵀX, Hessian of the squared output error (GPTQ, arXiv:2210.17323, eq. 3).

    float32 throughout; the sum is kept unscaled, lower panels only, until `matrix_II`.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum_II = torch.zeros(columns, columns, device=self.device)
        self._factors: dict[tuple[float, bool], InverseFactor] = {}

    def add(self, x_TI: Tensor) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        self._factors.clear()
        x_TI = x_TI.detach().reshape(-1, self.columns)
        self.tokens += x_TI.shape[0]
        if x_TI.is_cuda and x_TI.dtype != torch.float32:
            self._sum_II += torch.mm(x_TI.T, x_TI, out_dtype=torch.float32)
            return
        x_TI = x_TI.float()
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            panel = self._sum_II[start:stop, :stop]
            panel.addmm_(x_TI[:, start:stop].T, x_TI[:, :stop])

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._factors.clear()
        self._sum_II += other._sum_II
        self.tokens += other.tokens

    def matrix_II(self) -> Tensor:
        """The Hessian, symmetric float32 [I, I]; zeros where no token was seen."""
        full_II = self._sum_II * (2.0 / max(self.tokens, 1))
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            full_II[:start, start:stop] = full_II[start:stop, :start].T
        return full_II

    def diagonal_I(self) -> Tensor:
        """The Hessian's diagonal [I]: how much each input weighs."""
        return self._sum_II.diagonal() * (2.0 / max(self.tokens, 1))

    def inverse_factor(self, damping: float, order_I: Tensor | None) -> InverseFactor:
        """U with (H + damping)⁻¹ = UᵀU, factorised once for all linears that share this input.

        Args:
            damping: Share of the mean diagonal to add.
            order_I: The order of the columns by falling diagonal, or None as stored.

        Returns:
            The factor of the reordered Hessian.
        """
        key = (damping, order_I is not None)
        if key not in self._factors:
            hessian_II = self.matrix_II()
            if order_I is not None:
                hessian_II = hessian_II[order_I][:, order_I]
            self._factors[key] = inverse_factor(hessian_II, damping)
        return self._factors[key]
