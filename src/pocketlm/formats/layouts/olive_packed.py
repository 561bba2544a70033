"""Integer codes as Microsoft Olive holds them, and ONNX's MatMulNBits behind a reshape.

- ``qweight``  uint8 [O, I·bits/8], each row's unsigned codes, the first in the lowest bits;
- ``scales``   [O, G], in the scales' own dtype; float32 in MatMulNBits;
- ``qzeros``   uint8 [O, ⌈G·bits/8⌉], each row's unsigned zero points, packed as the codes are.

w = scale · (code - zero); a symmetric grid has the zero point 2^(bits-1). 2, 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.formats.layouts import Parts, take, take_as
from pocketlm.formats.packing import pack, unpack, words_per_row


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return ("qweight", "scales", "qzeros")


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    return {
        "qweight": ((rows, columns * spec.bits // 8), torch.uint8),
        "scales": ((rows, groups), scale_dtype),
        "qzeros": ((rows, -(-groups * spec.bits // 8)), torch.uint8),
    }


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a code does not fit.
    """
    assert isinstance(packed, PackedInt)
    zero_OG = packed.zero_OG
    if zero_OG is None:
        zero_OG = torch.zeros_like(packed.scale_OG, dtype=torch.int8)
    return {
        f"{module}.qweight": _packed(packed.codes_OI, packed.bits),
        f"{module}.scales": packed.scale_OG.contiguous(),
        f"{module}.qzeros": _packed(zero_OG, packed.bits),
    }


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> PackedInt:
    """The codes and scales of a weight.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, row_bytes = take(tensors, module, "qweight").shape
    columns = row_bytes * 8 // spec.bits
    known = parts(spec, (rows, columns), torch.float32)
    qweight_OB = take_as(tensors, module, "qweight", known["qweight"][0], "uint8")
    scale_OG = take_as(tensors, module, "scales", known["scales"][0], "float")
    qzeros_OB = take_as(tensors, module, "qzeros", known["qzeros"][0], "uint8")
    zero_OG = _unpacked(qzeros_OB, spec.bits, scale_OG.shape[1])
    if spec.symmetric and bool(zero_OG.any()):
        raise ArtifactError("has zero points, and its grid is symmetric.", where=module)
    codes_OI = _unpacked(qweight_OB, spec.bits, columns)
    return PackedInt(codes_OI, scale_OG, None if spec.symmetric else zero_OG, spec.bits)


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I), from the width of the packed rows."""
    rows, row_bytes = shapes(f"{module}.qweight")
    return rows, row_bytes * 8 // spec.bits


def _packed(codes_RC: Tensor, bits: int) -> Tensor:
    """Whole bytes of each row: what the last word has beyond them is zero."""
    row_bytes = -(-codes_RC.shape[1] * bits // 8)
    return pack(codes_RC.contiguous(), bits).view(torch.uint8)[:, :row_bytes].contiguous()


def _unpacked(bytes_RB: Tensor, bits: int, codes: int) -> Tensor:
    missing = 4 * words_per_row(codes, bits) - bytes_RB.shape[1]
    words_RW = torch.nn.functional.pad(bytes_RB, (0, missing)).view(torch.int32)
    return unpack(words_RW, bits, codes)
