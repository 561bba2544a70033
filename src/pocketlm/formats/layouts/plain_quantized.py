"""Codes in a dtype of their own, under the weight's own name.

``int-quantized``, ``float-quantized``, ``naive-quantized`` and ``mxfp8-quantized`` of
compressed-tensors:

- ``weight``        int8 or float8_e4m3fn [O, I];
- ``weight_scale``  [1] for the tensor, [O, 1] for rows, [O, G] for groups, [⌈O/r⌉, ⌈I/c⌉] for
  blocks, in the scales' own dtype; MXFP8: uint8 [O, I/32], exponents of two.

Symmetric only. Integers lie here where activations are integers too; alone they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.scales import Scale
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.formats.layouts import Parts, take, take_as


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return ("weight", "weight_scale")


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    codes = torch.int8 if spec.type == "int" else torch.float8_e4m3fn
    scales = (1,) if spec.group_rows is None else spec.tiles(shape)
    return {
        "weight": (shape, codes),
        "weight_scale": (scales, scale_dtype if spec.scale == "float" else torch.uint8),
    }


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name."""
    if isinstance(packed, PackedInt):
        codes_OI, scale_RG = packed.codes_OI, packed.scale_OG
    else:
        codes_OI, scale_RG = packed.codes_OI.view(torch.float8_e4m3fn), packed.scale.stored_RG
        if packed.spec.group_rows is None:
            scale_RG = scale_RG.view(1)
    return {
        f"{module}.weight": codes_OI.contiguous(),
        f"{module}.weight_scale": scale_RG.contiguous(),
    }


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> Packed:
    """The codes and scales of a weight.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, columns = take(tensors, module, "weight").shape
    known = parts(spec, (rows, columns), torch.float32)
    (codes_shape, codes_dtype), (scale_shape, scale_dtype) = known["weight"], known["weight_scale"]
    name = str(codes_dtype).removeprefix("torch.")
    codes_OI = take_as(tensors, module, "weight", codes_shape, name)
    scale_name = "uint8" if scale_dtype is torch.uint8 else "float"
    scale = take_as(tensors, module, "weight_scale", scale_shape, scale_name)
    if spec.type == "int":
        return PackedInt(codes_OI, scale, None, spec.bits)
    kept = Scale(spec.scale, scale.view(spec.tiles((rows, columns))))
    return PackedFloat(codes_OI.view(torch.uint8), kept, spec)


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): that of ``weight``."""
    rows, columns = shapes(f"{module}.weight")
    return rows, columns
