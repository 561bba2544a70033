"""A linear layer that holds its weight packed: what `load` puts in place of Linear and Conv1D.

The weight lies in the layout of the kernel chosen for it and nowhere else; see kernels/select.py.

Legend: M rows of activations, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.tensors import Packed
from pocketlm.runtime.kernels.base import CodeKernel, Grid
from pocketlm.runtime.kernels.select import announce, kernel_for


class PackedLinear(nn.Module):
    """y = x Wᵀ + b from packed codes.

    Args:
        weight: Codes and scales [O, I], on the CPU.
        bias: [O] or None.
        quantizer: What rounds the inputs; None: nothing.
        dtype: Of the activations.
        device: Where it runs.
    """

    def __init__(
        self,
        weight: Packed,
        bias: Tensor | None = None,
        quantizer: InputQuantizer | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.grid = Grid.of(weight, None if quantizer is None else quantizer.spec)
        self.quantizer = None if quantizer is None else quantizer.to(device)
        self.in_features, self.out_features = self.grid.columns, self.grid.rows
        self.dtype = dtype
        self.choice = kernel_for(self.grid, dtype, device)
        announce(self.choice, self.grid)
        self._tiles_from = self.choice.tiles_from
        self._multiplies_codes = isinstance(self.choice.kernel, CodeKernel)  # 30 us to find out
        for name, buffer in self.choice.kernel.pack(weight, dtype, device).items():
            self.register_buffer(name, buffer)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight in memory: codes, scales and zero points."""
        return sum(b.numel() * b.element_size() for b in self.buffers(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis, [..., I] → [..., O]."""
        if x.numel() == 0:  # an expert without tokens
            return x.new_empty(*x.shape[:-1], self.out_features)
        x_MI = x.reshape(-1, self.in_features)
        y_MO = self._product(x_MI)
        if self.bias is not None:
            y_MO = y_MO + self.bias
        return y_MO.view(*x.shape[:-1], self.out_features)

    def _product(self, x_MI: Tensor) -> Tensor:
        """The inputs rounded, and multiplied as codes where the kernel does that."""
        quantizer: InputQuantizer | None = self.quantizer
        kernel: Any = self.choice.kernel
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[assignment]
        if self._multiplies_codes:
            assert quantizer is not None  # no such kernel takes inputs as they come
            return kernel.matmul_codes(quantizer.encode(x_MI), buffers, x_MI.dtype)
        if quantizer is not None:
            x_MI = quantizer(x_MI)
        many = self._tiles_from is not None and x_MI.shape[0] >= self._tiles_from
        product = kernel.matmul_tiles if many else kernel.matmul
        return product(x_MI, buffers, self.grid)

    def extra_repr(self) -> str:
        """Shape, grid and kernel."""
        grid = self.grid
        return (
            f"{self.in_features}, {self.out_features}, {grid.name}, "
            f"group_size={grid.group_size}, "
            + ("" if grid.inputs is None else f"inputs={grid.inputs.name}, ")
            + f"kernel={self.choice.kernel.name}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Refuses to move: a layout belongs to one device and one activation dtype."""
        sample = torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)
        moved = fn(sample)
        if moved.dtype is not self.dtype or moved.device != sample.device:
            raise ConfigError(
                f"a packed model cannot be moved from {sample.device} {self.dtype} "
                f"to {moved.device} {moved.dtype}.",
                remedy="Load it again with device= and dtype=.",
            )
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModel(
            "a packed model in memory has a layout of its own and is not saved.",
            remedy="Copy the directory it was loaded from.",
        )
