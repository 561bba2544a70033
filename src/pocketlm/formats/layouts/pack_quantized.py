"""Integer codes packed into words, ``pack-quantized`` of compressed-tensors.

- ``weight_packed``  int32 [O, ⌈I·bits/32⌉], the codes packed along rows (`packing.py`);
- ``weight_scale``   [O, G] in the scales' own dtype, G = 1 for one scale a row;
- ``weight_zero_point``  int32 [⌈O·bits/32⌉, G], packed along columns; asymmetric grids only;
- ``weight_shape``   int64 [2], O and I.

What it means: w = scale · (code - zero), both codes and zeros signed. No activation order
(``g_idx``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.formats.layouts import Parts, take
from pocketlm.formats.packing import pack, unpack, words_per_row


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    zero = () if spec.symmetric else ("weight_zero_point",)
    return ("weight_packed", "weight_scale", *zero, "weight_shape")


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    known: Parts = {
        "weight_packed": ((rows, words_per_row(columns, spec.bits)), torch.int32),
        "weight_scale": ((rows, groups), scale_dtype),
        "weight_zero_point": ((words_per_row(rows, spec.bits), groups), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    return {role: known[role] for role in roles(spec)}


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a code or zero point does not fit.
    """
    assert isinstance(packed, PackedInt)
    out = {
        f"{module}.weight_packed": pack(packed.codes_OI, packed.bits),
        f"{module}.weight_scale": packed.scale_OG.contiguous(),
    }
    if packed.zero_OG is not None:
        zero_GO = pack(packed.zero_OG.T.contiguous(), packed.bits)
        out[f"{module}.weight_zero_point"] = zero_GO.T.contiguous()
    out[f"{module}.weight_shape"] = torch.tensor(packed.shape, dtype=torch.int64)
    return out


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> PackedInt:
    """The codes and scales of a weight.

    Args:
        tensors: By name, at least those of this weight; others are not looked at.
        module: Module path.
        spec: Its grid.

    Raises:
        ArtifactError: If a tensor is missing or the shapes contradict each other.
    """
    words_OW = take(tensors, module, "weight_packed")
    scale_OG = take(tensors, module, "weight_scale")
    shape = [int(side) for side in take(tensors, module, "weight_shape")]
    if len(shape) != 2 or words_OW.dim() != 2 or words_OW.shape[0] != shape[0]:
        raise ArtifactError(
            f"weight_shape is {shape}, weight_packed is {tuple(words_OW.shape)}.", where=module
        )
    rows, columns = shape
    fits = scale_OG.dim() == 2 and scale_OG.shape[0] == rows and scale_OG.shape[1] > 0
    if not fits or columns % scale_OG.shape[1]:
        raise ArtifactError(
            f"weight_scale {tuple(scale_OG.shape)} does not divide a {rows} x {columns} weight.",
            where=module,
        )
    group = columns // scale_OG.shape[1]
    if group != (spec.group_size or columns):
        asked = spec.group_size or "whole rows"
        raise ArtifactError(f"has groups of {group} where config.json says {asked}.", where=module)
    zero_OG = None
    if f"{module}.weight_zero_point" in tensors:
        zero_PG = tensors[f"{module}.weight_zero_point"]
        expected = (words_per_row(rows, spec.bits), scale_OG.shape[1])
        if tuple(zero_PG.shape) != expected:
            raise ArtifactError(
                f"weight_zero_point is {tuple(zero_PG.shape)}, not {expected}.", where=module
            )
        zero_OG = unpack(zero_PG.T.contiguous(), spec.bits, rows).T.contiguous()
    try:
        codes_OI = unpack(words_OW, spec.bits, columns)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=module, remedy=error.remedy) from None
    return PackedInt(codes_OI, scale_OG, zero_OG, spec.bits)


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): ``weight_shape`` holds it."""
    rows, columns = read(f"{module}.weight_shape").tolist()
    return rows, columns
