"""A weight and two thin factors beside it: its own layout for the one, `low_rank` for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.factored import Sum
from pocketlm.core.stored import SparseSpec, SumSpec
from pocketlm.formats.layouts import Layout, Parts, low_rank, sparse


def _base(spec: SumSpec) -> Layout:
    return sparse if isinstance(spec.base, SparseSpec) else low_rank.factor_layout(spec.base)


def roles(spec: SumSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return (*_base(spec).roles(spec.base), *low_rank.roles(spec.low))


def parts(spec: SumSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    base = _base(spec).parts(spec.base, shape, scale_dtype)
    return {**base, **low_rank.parts(spec.low, shape, scale_dtype)}


def encode(module: str, weight: Sum) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a code or zero point does not fit.
    """
    base = _base(weight.spec).encode(module, weight.base)
    return {**base, **low_rank.encode(module, weight.low)}


def decode(tensors: Mapping[str, Tensor], module: str, spec: SumSpec) -> Sum:
    """The base and the factors.

    Raises:
        ArtifactError: If a tensor is missing, or the shapes contradict each other.
    """
    base = _base(spec).decode(tensors, module, spec.base)
    low = low_rank.decode(tensors, module, spec.low)
    if base.shape != low.shape:
        raise ArtifactError(
            f"its base is {base.shape}, its factors make {low.shape}.", where=module
        )
    return Sum(base, low)


def shape(
    module: str,
    spec: SumSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): that of the factors."""
    return low_rank.shape(module, spec.low, shapes, read)
