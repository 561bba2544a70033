"""A weight as it is, under its own name: ``weight`` [O, I], or [I, O] where a model has it so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.stored import DenseSpec
from pocketlm.core.tensors import Dense, WeightTensor
from pocketlm.formats.layouts import Parts, take


def roles(spec: DenseSpec) -> tuple[str, ...]:
    """The one tensor of a weight."""
    return ("weight",)


def parts(spec: DenseSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shape and dtype for a weight (O, I)."""
    return {"weight": (shape[::-1] if spec.transposed else shape, getattr(torch, spec.dtype))}


def encode(module: str, weight: WeightTensor) -> dict[str, Tensor]:
    """The stored tensor of a weight by name."""
    assert isinstance(weight, Dense)
    stored = weight.weight_OI.T if weight.transposed else weight.weight_OI
    return {f"{module}.weight": stored.contiguous()}


def decode(tensors: Mapping[str, Tensor], module: str, spec: DenseSpec) -> Dense:
    """The weight.

    Raises:
        ArtifactError: If its tensor is missing.
    """
    stored = take(tensors, module, "weight")
    return Dense(stored.T if spec.transposed else stored, spec.transposed)


def shape(
    module: str,
    spec: DenseSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I)."""
    rows, columns = shapes(f"{module}.weight")
    return (columns, rows) if spec.transposed else (rows, columns)
