"""Rounds a linear's inputs as an engine does while the model runs: x̂ = scale · (code - zero).

The arithmetic is that of compressed-tensors' `fake_quantize`, bit for bit in float32:

symmetric   scale = max|x| / h,                 h = (2^bits - 1) / 2 for integers, 448 for E4M3
asymmetric  scale = (max x - min x) / (2^bits - 1),   zero = round(clamp(code_min - min x / scale))
code        round(clamp(x / scale + zero)),     a range always holds 0; a scale of 0 becomes 2^-23

With outliers (LLM.int8(), arXiv:2208.07339, equation 8) a value of at least that magnitude stays as
it came, and the scale is that of the others:  x̂ = scale · (code - zero) + [|x| ≥ α] x.
Deviation: the paper takes a column apart for all tokens of the input as soon as one token has an
outlier in it; here each token has its own. That is the same for one token, and so what a model
generates does not depend on how its prompt is cut into batches.

Inputs of 16 bits are rounded in float32, as kernels do it (compressed-tensors stays in 16 bits).
Gradients pass straight through: the rounding counts as the identity where nothing is clamped.

Legend: T tokens, I input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.spec import ActivationSpec

E4M3_MAX = 448.0
LEAST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Codes:
    """Rounded inputs, not yet multiplied out.

    Attributes:
        levels: float32 of the input's shape (split into groups where these share a scale): whole
            numbers, or values of E4M3.
        scale: float32, broadcasts against the levels.
        zero: float32 likewise; None where symmetric.
        outliers: float32 of the levels' shape: the values that stay as they came, 0 where one was
            rounded; None where all were.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | None
    outliers: Tensor | None = None

    def decode(self) -> Tensor:
        """x̂, float32."""
        levels = self.levels if self.zero is None else self.levels - self.zero
        rounded = levels * self.scale
        return rounded if self.outliers is None else rounded + self.outliers


@dataclass(frozen=True)
class InputQuantizer:
    """The rounding of one linear's inputs.

    Attributes:
        spec: What kind.
        scale: float32 [1] of a static rounding, else None.
        zero: int8 [1] of a static asymmetric one, else None.
    """

    spec: ActivationSpec
    scale: Tensor | None = None
    zero: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ of any [..., I], in the dtype of x."""
        if x.numel() == 0:  # an expert without tokens
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self)  # pyright: ignore[reportReturnType]
        return self._rounded(x).to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        return self.encode(x).decode().view(x.shape)

    def encode(self, x: Tensor) -> Codes:
        """Codes and scales of any [..., I]."""
        spec, wide = self.spec, x.float()
        outliers = None
        if spec.outliers is not None:
            kept = wide.abs() >= spec.outliers
            outliers, wide = torch.where(kept, wide, 0.0), torch.where(kept, 0.0, wide)
        if spec.group_size is not None:
            wide = wide.unflatten(-1, (-1, spec.group_size))
        if self.scale is None:
            low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
            scale, zero = scale_of(low, high, spec)
        else:
            scale = self.scale.to(x.device)
            zero = None if self.zero is None else self.zero.to(x.device).float()
        return Codes(_nearest(wide, scale, zero, spec), scale, zero, outliers)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and largest value that a static rounding does not clamp, float32 [1]."""
        assert self.scale is not None
        least, most = _code_range(self.spec)
        zero = 0.0 if self.zero is None else self.zero.float()
        return (least - zero) * self.scale, (most - zero) * self.scale

    def to(self, device: torch.device | str) -> InputQuantizer:
        """The same with its static scale on another device."""
        if self.scale is None:
            return self
        zero = None if self.zero is None else self.zero.to(device)
        return InputQuantizer(self.spec, self.scale.to(device), zero)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of a static rounding, by role: ``input_scale``, ``input_zero_point``."""
        found = {"input_scale": self.scale, "input_zero_point": self.zero}
        return {role: tensor.cpu().clone() for role, tensor in found.items() if tensor is not None}


def static_quantizer(low: Tensor, high: Tensor, spec: ActivationSpec) -> InputQuantizer:
    """The rounding of a whole tensor whose values lie between two bounds.

    Args:
        low: The least value, a scalar.
        high: The largest.
        spec: With granularity "tensor".
    """
    scale, zero = scale_of(low.float().reshape(1), high.float().reshape(1), spec)
    return InputQuantizer(spec, scale, None if zero is None else zero.to(torch.int8))


def scale_of(low: Tensor, high: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (float, whole; None where symmetric) for values in [low, high].

    Args:
        low: float32 of any shape.
        high: Likewise.
        spec: Bits and symmetry.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    codes = (1 << spec.bits) - 1
    if spec.symmetric:
        half = E4M3_MAX if spec.type == "float" else codes / 2
        scale = torch.maximum(-low, high) / half
        return torch.where(scale == 0, LEAST_SCALE, scale), None
    scale = (high - low) / codes
    least, most = _code_range(spec)
    zero = torch.where(scale == 0, 0.0, least - low / scale).clamp(least, most).round()
    return torch.where(scale == 0, LEAST_SCALE, scale), zero


def _code_range(spec: ActivationSpec) -> tuple[float, float]:
    if spec.type == "float":
        return -E4M3_MAX, E4M3_MAX
    half = float(1 << (spec.bits - 1))
    return -half, half - 1


def _nearest(x: Tensor, scale: Tensor, zero: Tensor | None, spec: ActivationSpec) -> Tensor:
    level = x / scale
    if zero is not None:
        level += zero
    level = level.clamp_(*_code_range(spec))
    if spec.type == "float":
        return level.to(torch.float8_e4m3fn).float()
    return level.round_()


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounding; backward: the identity, or zero where a static range clamps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: InputQuantizer) -> Tensor:
        rounded = quantizer.encode(x).decode().view(x.shape).to(x.dtype)
        if quantizer.scale is not None:
            low, high = quantizer.bounds()
            ctx.save_for_backward((x >= low) & (x <= high))
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if not ctx.saved_tensors:
            return grads[0], None
        return grads[0] * ctx.saved_tensors[0], None
