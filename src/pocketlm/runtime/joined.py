"""Linears that read one value, multiplied as one: their rows joined, the originals left as views.

One product of 6144 rows takes less time than three of 4096, 1024 and 1024, and on a CPU each call
saved is overhead saved. Codes are joined where a kernel's layout allows it; scales are copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from pocketlm.runtime.kernels.cpu import block_rows
from pocketlm.runtime.linear import PackedLinear

# Kernel → the axis of each buffer that runs over output rows, and rows that lie in one piece.
ROW_AXES: dict[str, tuple[dict[str, int], int]] = {
    "cpu-int4": ({"packed": 0, "scale_zero_GO2": 1}, block_rows()),
    "cpu-int8": ({"codes_OI": 0, "scale_O": 0}, 16),
    "cuda-int4": ({"packed": 0, "scale_zero_GO2": 1}, 8),
    "triton": ({"codes": 0, "high_bits": 0, "scale": 0, "zero": 0}, 16),
}


def joined(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One linear that gives the outputs of several, one after the other; None where it cannot."""
    if all(type(linear) is nn.Linear for linear in linears):
        return _joined_dense(linears)  # type: ignore[arg-type]
    if all(type(linear) is PackedLinear for linear in linears):
        return _joined_packed(linears)  # type: ignore[arg-type]
    return None


def _joined_dense(linears: Sequence[nn.Linear]) -> nn.Linear | None:
    weights = [linear.weight for linear in linears]
    if any(type(weight.data) is not torch.Tensor for weight in weights):  # 2:4 tensors
        return None
    one = nn.Linear(linears[0].in_features, sum(w.shape[0] for w in weights), device="meta")
    one.weight = nn.Parameter(_whole([w.data for w in weights], 0), requires_grad=False)
    one.bias = _joined_bias(linears)  # type: ignore[assignment]
    start = 0
    for weight in weights:
        weight.data = one.weight.data[start : start + weight.shape[0]]
        start += weight.shape[0]
    return one


def _joined_packed(linears: Sequence[PackedLinear]) -> PackedLinear | None:
    first = linears[0]
    known = ROW_AXES.get(first.choice.kernel.name)
    alike = {(linear.choice.kernel.name, replace(linear.grid, rows=0)) for linear in linears}
    if known is None or len(alike) > 1 or first.quantizer is not None:
        return None
    axes, piece = known
    if any(linear.grid.rows % piece for linear in linears) or not set(first._buffers) <= set(axes):
        return None
    one = copy.copy(first)
    one._buffers, one._parameters = {}, {}
    one.grid = replace(first.grid, rows=sum(linear.grid.rows for linear in linears))
    one.out_features = one.grid.rows
    for name in first._buffers:
        axis = axes[name]
        parts = [linear.get_buffer(name) for linear in linears]
        whole = _whole(parts, axis)
        one.register_buffer(name, whole)
        if axis == 0:  # a part of the whole is contiguous: memory is not taken twice
            sizes = [part.shape[0] for part in parts]
            for linear, part in zip(linears, whole.split(sizes), strict=True):
                linear._buffers[name] = part
    one.bias = _joined_bias(linears)
    if any(buffer.is_cuda for buffer in one.buffers()):
        torch.cuda.synchronize()  # a product may read its weights before the kernel in front ends
    return one


def _whole(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The parts one after the other; a view of them where memory has them so (native/pages.py)."""
    first, start = parts[0], parts[0].data_ptr()
    for part in parts:
        aside = part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if axis or aside or part.data_ptr() != start or not part.is_contiguous():
            return torch.cat(list(parts), dim=axis)
        start += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _joined_bias(linears: Sequence[nn.Linear | PackedLinear]) -> nn.Parameter | None:
    if all(linear.bias is None for linear in linears):
        return None
    like = next(linear.bias for linear in linears if linear.bias is not None)
    parts = [
        torch.zeros(linear.out_features, dtype=like.dtype, device=like.device)
        if linear.bias is None
        else linear.bias.data
        for linear in linears
    ]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
