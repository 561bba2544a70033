"""Codes of floats and tables as bytes, two 4-bit codes in one, the first in its lowest bits.

``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized`` of compressed-tensors, and in the format
``pocketlm`` every number format that is no integer:

- ``weight_packed``  uint8 [O, I·bits/8]; 2 and 3 bits: eight codes in as many bytes;
- ``weight_scale``   [R, G]: float, uint8 (powers of two; double-quantized) or float8_e4m3fn;
- ``weight_global_scale``  float32 [1], what E4M3 scales are divided by (NVFP4);
- ``weight_scale_absmax``  float32 [⌈R·G/256⌉] and ``weight_scale_offset`` float32 [1], of
  double-quantized scales (`core/scales.py`);
- ``weight_super_scale``  float16 [R, S], what the int8 scales of a K-quant multiply;
- ``weight_minimum``  [R, G] and ``weight_super_minimum`` [R, S], the same for its minima.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.scales import Scale
from pocketlm.core.spec import DOUBLE_BLOCK, SUPER_BLOCK, QuantSpec
from pocketlm.core.tensors import Packed, PackedFloat
from pocketlm.formats.layouts import Parts, take, take_as
from pocketlm.formats.packing import fills_bytes, pack_bytes, unpack_bytes

_OUTER = {
    "e4m3": "weight_global_scale",
    "dynamic8": "weight_scale_absmax",
    "k": "weight_super_scale",
}
_OFFSET, _MINIMUM, _OUTER_MINIMUM = (
    "weight_scale_offset", "weight_minimum", "weight_super_minimum",
)  # fmt: skip


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    outer = (_OUTER[spec.scale],) if spec.scale in _OUTER else ()
    offset = (_OFFSET,) if spec.scale == "dynamic8" else ()
    minima = () if spec.symmetric else (_MINIMUM,)
    if minima and spec.scale == "k":
        minima = (*minima, _OUTER_MINIMUM)
    return ("weight_packed", "weight_scale", *outer, *offset, *minima)


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I) whose rows fill whole bytes."""
    below, beside = spec.tiles(shape)
    dtypes = {"float": scale_dtype, "e4m3": torch.float8_e4m3fn, "k": torch.int8}
    if spec.type in ("k", "iq4_nl"):
        dtypes["float"] = torch.float16
    supers = ((shape[0], -(-shape[1] // SUPER_BLOCK)), torch.float16)
    known: Parts = {
        "weight_packed": ((shape[0], shape[1] * spec.bits // 8), torch.uint8),
        "weight_scale": ((below, beside), dtypes.get(spec.scale, torch.uint8)),
        "weight_global_scale": ((1,), torch.float32),
        "weight_scale_absmax": ((-(-below * beside // DOUBLE_BLOCK),), torch.float32),
        _OFFSET: ((1,), torch.float32),
        "weight_super_scale": supers,
        _MINIMUM: ((below, beside), torch.float16 if spec.scale == "float" else torch.uint8),
        _OUTER_MINIMUM: supers,
    }
    return {role: known[role] for role in roles(spec)}


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a row of codes does not fill whole bytes.
    """
    assert isinstance(packed, PackedFloat)
    if not fills_bytes(packed.shape[1], packed.bits):
        raise ArtifactError(
            f"rows of {packed.shape[1]} codes of {packed.bits} bits do not fill whole bytes.",
            where=module,
        )
    tensors = (pack_bytes(packed.codes_OI, packed.bits), *packed.scale.tensors)
    named = zip(roles(packed.spec), tensors, strict=True)
    return {f"{module}.{role}": tensor.contiguous() for role, tensor in named}


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> PackedFloat:
    """The codes and scales of a weight.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, row_bytes = take(tensors, module, "weight_packed").shape
    columns = row_bytes * 8 // spec.bits
    found: dict[str, Tensor] = {}
    for role, (role_shape, dtype) in parts(spec, (rows, columns), torch.float32).items():
        plain_scale = role in ("weight_scale", _MINIMUM) and spec.scale == "float"
        name = "float" if plain_scale else str(dtype).removeprefix("torch.")
        found[role] = take_as(tensors, module, role, role_shape, name)
    outer = found[_OUTER[spec.scale]] if spec.scale in _OUTER else None
    minima = (found.get(_MINIMUM), found.get(_OUTER_MINIMUM))
    scale = Scale(spec.scale, found["weight_scale"], outer, found.get(_OFFSET), *minima)
    return PackedFloat(unpack_bytes(found["weight_packed"], spec.bits), scale, spec)


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I), from the width of the packed rows."""
    rows, row_bytes = shapes(f"{module}.weight_packed")
    return rows, row_bytes * 8 // spec.bits
