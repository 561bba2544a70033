"""What reached a group of linears while calibration data flowed. Methods do not know of it.

Legend: T tokens, I input columns.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pocketlm.core.errors import NumericError
from pocketlm.core.stats import Hessian


class InputHealth(BaseModel):
    """The inputs of a linear on the calibration data.

    Attributes:
        tokens: That reached it.
        columns: I.
        effective_rank: In how many directions they vary (`Hessian.effective_rank`); None where no
            step asked for a Hessian.
        dead_columns: That were zero for every token.
        constant_columns: That had one other value for every token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    columns: int
    effective_rank: float | None
    dead_columns: int
    constant_columns: int

    @property
    def few(self) -> bool:
        """Fewer tokens than columns: their Hessian alone would be singular."""
        return 0 < self.tokens < self.columns


class InputWatch:
    """Sees the inputs of a group as its statistics do.

    Args:
        columns: I.
        device: Where inputs lie.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._tokens = 0
        self._low_I = torch.full((columns,), torch.inf, device=device)
        self._high_I = torch.full((columns,), -torch.inf, device=device)

    def add(self, x_TI: Tensor) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, len(self._low_I))
        if not len(x_TI):
            return
        self._tokens += len(x_TI)
        low_I, high_I = torch.aminmax(x_TI, dim=0)
        self._low_I = torch.minimum(self._low_I, low_I.float())
        self._high_I = torch.maximum(self._high_I, high_I.float())

    def require_finite(self, where: str) -> None:
        """Stops at inputs that would spoil every statistic.

        Raises:
            NumericError: Naming the linear and how many columns hold NaN or Inf.
        """
        if not self._tokens:
            return
        broken = int((~(torch.isfinite(self._low_I) & torch.isfinite(self._high_I))).sum())
        if broken:
            raise NumericError(
                f"its inputs are not finite in {broken} of {len(self._low_I)} columns.",
                where=where,
                remedy="The model overflows on the calibration text: try another --calibration, "
                "or add the layers before it to --ignore.",
            )

    def health(self, hessian: Hessian | None) -> InputHealth:
        """The account of what was seen, with the rank of the Hessian where there is one."""
        fixed_I = self._low_I == self._high_I
        dead = int((fixed_I & (self._low_I == 0)).sum())
        return InputHealth(
            tokens=self._tokens,
            columns=len(self._low_I),
            effective_rank=None if hessian is None else round(hessian.effective_rank(), 1),
            dead_columns=dead,
            constant_columns=int(fixed_I.sum()) - dead if self._tokens > 1 else 0,
        )
