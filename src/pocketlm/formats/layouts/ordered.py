"""``pack-quantized`` with ``weight_g_idx``, the group of each column: activation order by group.

compressed-tensors wrote it until 2026; it is read here, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError, UnsupportedLayer
from pocketlm.core.permuted import Permuted, sort_by_group
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt, WeightTensor
from pocketlm.formats.layouts import Parts, pack_quantized, take_as

GROUP_OF = "weight_g_idx"


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return (*pack_quantized.roles(spec), GROUP_OF)


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    known = pack_quantized.parts(spec, shape, scale_dtype)
    return {**known, GROUP_OF: ((shape[1],), torch.int32)}


def encode(module: str, weight: WeightTensor) -> dict[str, Tensor]:
    """Refuses: no current engine loads it."""
    raise UnsupportedLayer("activation order by group is not written.", where=module)


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> PackedInt | Permuted:
    """The codes and scales of a weight.

    Raises:
        ArtifactError: If a tensor is missing or the shapes contradict each other.
    """
    packed = pack_quantized.decode(tensors, module, spec)
    group_I = take_as(tensors, module, GROUP_OF, (packed.shape[1],), "int32")
    try:
        return sort_by_group(packed, group_I)
    except ValueError as error:
        raise ArtifactError(f"{GROUP_OF} {error}.", where=module) from None


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): ``weight_shape`` holds it."""
    return pack_quantized.shape(module, spec, shapes, read)
