"""Two thin factors in the place of a weight, each stored as a weight of its own.

``x.weight`` [O, I] becomes ``x.left.…`` [O, R] and ``x.right.…`` [R, I], whose product it is:
``left.weight`` and ``right.weight`` where they are floats, else the tensors that the layout of
their codes makes of a weight, such as ``left.weight_packed``.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.factored import LowRank
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import DenseSpec, LowRankSpec
from pocketlm.formats.layouts import (
    FACTORS,
    Layout,
    Parts,
    dense,
    float_packed,
    pack_quantized,
)

LEFT, RIGHT = FACTORS


def factor_layout(spec: QuantSpec | DenseSpec) -> Layout:
    """How a factor is stored."""
    if isinstance(spec, DenseSpec):
        return dense
    return pack_quantized if spec.type == "int" else float_packed


def _sides(spec: LowRankSpec) -> dict[str, QuantSpec | DenseSpec]:
    return {LEFT: spec.left, RIGHT: spec.right}


def roles(spec: LowRankSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return tuple(
        f"{side}.{role}"
        for side, factor in _sides(spec).items()
        for role in factor_layout(factor).roles(factor)
    )


def parts(spec: LowRankSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    shapes = {LEFT: (shape[0], spec.rank), RIGHT: (spec.rank, shape[1])}
    return {
        f"{side}.{role}": part
        for side, factor in _sides(spec).items()
        for role, part in factor_layout(factor).parts(factor, shapes[side], scale_dtype).items()
    }


def encode(module: str, weight: LowRank) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a code or zero point does not fit.
    """
    left, right = factor_layout(weight.spec.left), factor_layout(weight.spec.right)
    return {
        **left.encode(f"{module}.{LEFT}", weight.left),
        **right.encode(f"{module}.{RIGHT}", weight.right),
    }


def decode(tensors: Mapping[str, Tensor], module: str, spec: LowRankSpec) -> LowRank:
    """The factors.

    Raises:
        ArtifactError: If a tensor is missing, or the factors do not have the rank.
    """
    left = factor_layout(spec.left).decode(tensors, f"{module}.{LEFT}", spec.left)
    right = factor_layout(spec.right).decode(tensors, f"{module}.{RIGHT}", spec.right)
    if (left.shape[1], right.shape[0]) != (spec.rank, spec.rank):
        raise ArtifactError(
            f"its factors are {left.shape} and {right.shape}, config.json says rank {spec.rank}.",
            where=module,
        )
    return LowRank(left, right)


def shape(
    module: str,
    spec: LowRankSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): the rows of the left factor, the columns of the right one."""
    left, right = factor_layout(spec.left), factor_layout(spec.right)
    rows, _ = left.shape(f"{module}.{LEFT}", spec.left, shapes, read)
    _, columns = right.shape(f"{module}.{RIGHT}", spec.right, shapes, read)
    return rows, columns
