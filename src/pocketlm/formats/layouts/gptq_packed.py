"""Integer codes as GPTQ files hold them: packed along the inputs, transposed.

- ``qweight``  int32 [I·bits/32, O], each column one row's codes as a little-endian bit stream;
- ``qzeros``   int32 [G, O·bits/32], zero points packed along the outputs;
- ``scales``   [G, O], float16;
- ``g_idx``    int32 [I], the group of each column; files of some tools lack it.

Codes and zero points are unsigned: w = scale · (code - zero). The first version of the format
stores zero - 1 (modulo 2^bits), the second (``gptq_v2``) zero itself. Engines disagree on what the
first means by a stored 2^bits - 1; the writers that made it meant 0, and so it is read here, but
not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.permuted import Permuted, sort_by_group
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats.layouts import Parts, take, take_as
from pocketlm.formats.packing import pack, unpack, words_per_row


@dataclass(frozen=True)
class GptqPacked:
    """A layout of one convention.

    Attributes:
        zero_shift: What is taken from a zero point before it is stored: 1 or 0.
        ordered: Whether ``g_idx`` is there.
    """

    zero_shift: int
    ordered: bool = True

    def roles(self, spec: QuantSpec) -> tuple[str, ...]:
        """The tensors of a weight, in the order in which they are written."""
        return ("qweight", "qzeros", "scales", *(("g_idx",) if self.ordered else ()))

    def parts(self, spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
        """Shapes and dtypes for a weight (O, I)."""
        rows, columns = shape
        groups = columns // spec.group_size if spec.group_size else 1
        known: Parts = {
            "qweight": ((words_per_row(columns, spec.bits), rows), torch.int32),
            "qzeros": ((groups, words_per_row(rows, spec.bits)), torch.int32),
            "scales": ((groups, rows), torch.float16),
            "g_idx": ((columns,), torch.int32),
        }
        return {role: known[role] for role in self.roles(spec)}

    def encode(self, module: str, weight: PackedInt | Permuted) -> dict[str, Tensor]:
        """The stored tensors of a weight by name.

        Raises:
            ArtifactError: If a code or zero point does not fit, or a scale is none in float16.
        """
        packed = weight.values if isinstance(weight, Permuted) else weight
        codes_OI, columns = packed.codes_OI, packed.shape[1]
        group_I = torch.arange(columns, device=codes_OI.device) // packed.group_size
        if isinstance(weight, Permuted):
            group_I = weight.group_of_I
            codes_OI = torch.empty_like(codes_OI).index_copy_(1, weight.order_I, codes_OI)
        scale_GO = packed.scale_OG.T.to(torch.float16).contiguous()
        if not bool(torch.isfinite(scale_GO).all()):
            raise ArtifactError("a scale does not fit into float16.", where=module)
        lowest = -(1 << (packed.bits - 1))
        zero_GO = scale_GO.new_zeros(scale_GO.shape, dtype=torch.int8)
        if packed.zero_OG is not None:
            zero_GO = packed.zero_OG.T.contiguous()
        if self.zero_shift and bool((zero_GO == lowest).any()):
            raise ArtifactError(
                "has a zero point at the lowest code, which engines read differently in gptq.",
                where=module,
                remedy="Write it as gptq_v2.",
            )
        out = {
            "qweight": pack(codes_OI, packed.bits).T.contiguous(),
            "qzeros": pack(zero_GO - self.zero_shift, packed.bits),
            "scales": scale_GO,
            "g_idx": group_I.to(torch.int32),
        }
        return {f"{module}.{role}": out[role] for role in self.roles(packed.spec)}

    def decode(
        self, tensors: Mapping[str, Tensor], module: str, spec: QuantSpec
    ) -> PackedInt | Permuted:
        """The codes and scales of a weight.

        Raises:
            ArtifactError: If a tensor is missing or not what the spec says.
        """
        rows, columns = _shape(tuple(take(tensors, module, "qweight").shape), spec, module)
        known = self.parts(spec, (rows, columns), torch.float16)
        words = {
            role: take_as(tensors, module, role, known[role][0], "int32")
            for role in known
            if role != "scales"
        }
        scale_GO = take_as(tensors, module, "scales", known["scales"][0], "float")
        codes_OI = unpack(words["qweight"].T.contiguous(), spec.bits, columns)
        zero_GO = unpack(words["qzeros"], spec.bits, rows)
        zero_OG = self._shifted(zero_GO, spec.bits).T.contiguous()
        if spec.symmetric:
            _require_middle(zero_OG, spec.bits, module)
        scale_OG = scale_GO.T.contiguous()
        packed = PackedInt(codes_OI, scale_OG, None if spec.symmetric else zero_OG, spec.bits)
        if not self.ordered:
            return packed
        try:
            return sort_by_group(packed, words["g_idx"])
        except ValueError as error:
            raise ArtifactError(f"g_idx {error}.", where=module) from None

    def _shifted(self, zero_GO: Tensor, bits: int) -> Tensor:
        """Zero points as they are, from what is stored; both less 2^(bits-1)."""
        offset = 1 << (bits - 1)
        unsigned = zero_GO.to(torch.int16) + offset + self.zero_shift
        return (unsigned % (2 * offset) - offset).to(torch.int8)

    def shape(
        self,
        module: str,
        spec: QuantSpec,
        shapes: Callable[[str], tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> tuple[int, int]:
        """(O, I), from the shape of the packed columns."""
        return _shape(shapes(f"{module}.qweight"), spec, module)


def _shape(stored: tuple[int, ...], spec: QuantSpec, module: str) -> tuple[int, int]:
    if len(stored) != 2 or stored[0] * 32 % spec.bits:
        raise ArtifactError(f"qweight is {stored}, no matrix of {spec.bits} bits.", where=module)
    columns = stored[0] * 32 // spec.bits
    if not spec.fits(columns):
        raise ArtifactError(
            f"groups of {spec.group_size} do not divide its {columns} columns.", where=module
        )
    return stored[1], columns


def _require_middle(zero_OG: Tensor, bits: int, module: str) -> None:
    low, high = (int(end) for end in torch.aminmax(zero_OG))
    if low or high:
        middle = 1 << (bits - 1)
        raise ArtifactError(
            f"its zero points are {low + middle} to {high + middle}, but config.json says that "
            f"the grid is symmetric, which is {middle}.",
            where=module,
            remedy="Set checkpoint_format (gptq or gptq_v2) and sym as the file was written.",
        )
