"""Linear layers of several products: two thin ones for a factorised weight, and a base beside them.

y = L (R x), and y = B x + L (R x): the dense weight is never formed. A token costs R (O + I)
multiplications for the factors, and what the base costs on top.

Legend: I input columns, O output rows, R rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from pocketlm.core.activations import InputQuantizer


class LowRankLinear(nn.Module):
    """y = L (R x) + b.

    Args:
        left: Multiplies by L, with the bias.
        right: Multiplies by R, without one; rounds the inputs where they are rounded.
    """

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis, [..., I] → [..., O]."""
        return self.left(self.right(x))


class SumLinear(nn.Module):
    """y = B x + L (R x) + b.

    Args:
        base: Multiplies by B, with the bias.
        low: Multiplies by L R, without one.
    """

    def __init__(self, base: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.base, self.low = base, low

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis, [..., I] → [..., O]."""
        return self.base(x) + self.low(x)


class RoundedInputs(nn.Module):
    """A linear whose inputs are rounded first.

    Args:
        linear: Multiplies.
        quantizer: Rounds, on the linear's device.
    """

    def __init__(self, linear: nn.Module, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.linear, self.quantizer = linear, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis, [..., I] → [..., O]."""
        return self.linear(self.quantizer(x))
