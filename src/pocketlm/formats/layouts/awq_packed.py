"""Integer codes as AWQ files of the version ``gemm`` hold them: 4 bits, packed along the outputs.

- ``qweight``  int32 [I, O/8], eight neighbouring outputs of an input in a word;
- ``qzeros``   int32 [G, O/8], zero points, packed alike;
- ``scales``   [G, O], float16.

The nibbles of a word, from its lowest bits, hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of the eight. Codes
and zero points are unsigned: w = scale · (code - zero).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.formats.layouts import Parts, take, take_as
from pocketlm.formats.packing import pack, unpack

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight lies in each nibble
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse


def roles(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    return ("qweight", "qzeros", "scales")


def parts(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    return {
        "qweight": ((columns, rows // 8), torch.int32),
        "qzeros": ((groups, rows // 8), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }


def encode(module: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a weight by name; a symmetric grid has its zero at 8.

    Raises:
        ArtifactError: If a code or zero point does not fit, or a scale is none in float16.
    """
    assert isinstance(packed, PackedInt)
    scale_GO = packed.scale_OG.T.to(torch.float16).contiguous()
    if not bool(torch.isfinite(scale_GO).all()):
        raise ArtifactError("a scale does not fit into float16.", where=module)
    zero_GO = scale_GO.new_zeros(scale_GO.shape, dtype=torch.int8)
    if packed.zero_OG is not None:
        zero_GO = packed.zero_OG.T.contiguous()
    return {
        f"{module}.qweight": pack(_reordered(packed.codes_OI.T, ORDER), BITS),
        f"{module}.qzeros": pack(_reordered(zero_GO, ORDER), BITS),
        f"{module}.scales": scale_GO,
    }


def decode(tensors: Mapping[str, Tensor], module: str, spec: QuantSpec) -> PackedInt:
    """The codes, scales and zero points of a weight.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, columns = _shape(tuple(take(tensors, module, "qweight").shape), spec, module)
    known = parts(spec, (rows, columns), torch.float16)
    words_IW = take_as(tensors, module, "qweight", known["qweight"][0], "int32")
    zeros_GW = take_as(tensors, module, "qzeros", known["qzeros"][0], "int32")
    scale_GO = take_as(tensors, module, "scales", known["scales"][0], "float")
    codes_OI = _reordered(unpack(words_IW, BITS, rows), PLACE).T.contiguous()
    zero_OG = _reordered(unpack(zeros_GW, BITS, rows), PLACE).T.contiguous()
    return PackedInt(codes_OI, scale_GO.T.contiguous(), zero_OG, BITS)


def shape(
    module: str,
    spec: QuantSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I), from the shape of the packed rows."""
    return _shape(shapes(f"{module}.qweight"), spec, module)


def _shape(stored: tuple[int, ...], spec: QuantSpec, module: str) -> tuple[int, int]:
    if len(stored) != 2 or not spec.fits(stored[0]):
        raise ArtifactError(f"qweight is {stored}; groups are {spec.group_size}.", where=module)
    return stored[1] * 8, stored[0]


def _reordered(matrix_RO: Tensor, order: tuple[int, ...]) -> Tensor:
    """Each eight neighbours of a row in another order."""
    rows, columns = matrix_RO.shape
    return matrix_RO.reshape(rows, columns // 8, 8)[:, :, list(order)].reshape(rows, columns)
