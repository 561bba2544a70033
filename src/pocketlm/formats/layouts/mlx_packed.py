"""Integer codes as MLX holds them: packed along the inputs, an offset in the place of a zero point.

- ``weight``  uint32 [O, I·bits/32], each row's unsigned codes as a little-endian bit stream;
- ``scales``  [O, G] and ``biases`` [O, G], in the scales' own dtype.

w = scale · code + bias; our zero point z makes bias = -scale · (z + 2^(bits-1)). Where z is 0 that
is exact, a power of two times the scale; else it is rounded to the scales' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Dense, Packed, PackedInt
from pocketlm.formats.layouts import Parts, take, take_as
from pocketlm.formats.packing import pack, unpack, words_per_row


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return ("weight", "scales", "biases")


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    return {
        "weight": ((rows, words_per_row(columns, spec.bits)), torch.uint32),
        "scales": ((rows, groups), scale_dtype),
        "biases": ((rows, groups), scale_dtype),
    }


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a code does not fit, or an offset is too large for the scales' dtype.
    """
    assert isinstance(packed, PackedInt)
    scale_OG, zero_OG = packed.scale_OG, packed.zero_OG
    offset_OG = torch.full_like(scale_OG, 1 << (packed.bits - 1), dtype=torch.float32)
    if zero_OG is not None:
        offset_OG += zero_OG
    bias_OG = (-scale_OG.float() * offset_OG).to(scale_OG.dtype)
    if not bool(torch.isfinite(bias_OG).all()):
        raise ArtifactError(f"an offset does not fit into {scale_OG.dtype}.", where=module)
    return {
        f"{module}.weight": pack(packed.codes_OI, packed.bits).view(torch.uint32),
        f"{module}.scales": scale_OG.contiguous(),
        f"{module}.biases": bias_OG.contiguous(),
    }


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> Dense:
    """The weight in float32; its offsets are no zero points any more.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, words = take(tensors, module, "weight").shape
    columns = words * 32 // spec.bits
    known = parts(spec, (rows, columns), torch.float16)
    words_OW = take_as(tensors, module, "weight", known["weight"][0], "uint32")
    scale_OG = take_as(tensors, module, "scales", known["scales"][0], "float")
    bias_OG = take_as(tensors, module, "biases", known["biases"][0], "float")
    codes_OI = unpack(words_OW.view(torch.int32), spec.bits, columns)
    codes_OGi = codes_OI.float().view(rows, scale_OG.shape[1], -1) + (1 << (spec.bits - 1))
    weight_OGi = codes_OGi * scale_OG.float()[:, :, None] + bias_OG.float()[:, :, None]
    return Dense(weight_OGi.view(rows, columns))


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I), from the width of the packed rows."""
    rows, words = shapes(f"{module}.weight")
    return rows, words * 32 // spec.bits
