"""A linear whose inputs are brought into the order in which its columns are stored."""

from __future__ import annotations

from torch import Tensor, nn


class PermutedLinear(nn.Module):
    """y = f(x[…, order]).

    Args:
        inner: The linear, its columns sorted by group.
        order_I: The input that each of its columns belongs to, int64 [I].
    """

    def __init__(self, inner: nn.Module, order_I: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("order_I", order_I, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis, [..., I] → [..., O]."""
        return self.inner(x.index_select(-1, self.get_buffer("order_I")))
