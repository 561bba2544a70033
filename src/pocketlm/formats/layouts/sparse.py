"""Kept values and the mask that says where they lie; the rest of a weight is not stored.

- ``weight_mask``    which weights are kept, row after row. Any: uint8 [⌈O·I/8⌉], a bit each, the
  first in the lowest bit. N:M: the number of each group's choice among the C(M, N) in rising order
  of its bits, ⌈log₂ C(M, N)⌉ bits each, packed into int32 [W] (`packing.py`): 3 bits for the four
  weights of 2:4, where a bitmap takes 4;
- ``weight_values``  [K]: the kept values, floats; or
- ``weight_packed``  their codes: integers int32 [⌈K·bits/32⌉], others uint8 [⌈K·bits/8⌉], with
  scales and zero points as in the layout of those codes;
- ``weight_shape``   int64 [2], O and I.

Legend: O output rows, I input columns, K kept values, M of N:M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.levels import codes_of
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import DenseSpec, SparseSpec
from pocketlm.core.tensors import Dense, Packed, PackedInt, Sparse, WeightTensor
from pocketlm.formats.layouts import Layout, Parts, float_packed, pack_quantized, take, take_as
from pocketlm.formats.packing import pack, pack_bytes, unpack, unpack_bytes, words_per_row

MASK, VALUES, PACKED, SHAPE = "weight_mask", "weight_values", "weight_packed", "weight_shape"


def _codes_layout(values: QuantSpec) -> Layout:
    return pack_quantized if values.type == "int" else float_packed


def _scale_roles(values: QuantSpec) -> tuple[str, ...]:
    return tuple(r for r in _codes_layout(values).roles(values) if r not in (PACKED, SHAPE))


def roles(spec: SparseSpec) -> tuple[str, ...]:
    """The tensors of a weight, in the order in which they are written."""
    if isinstance(spec.values, DenseSpec):
        return (MASK, VALUES, SHAPE)
    return (MASK, PACKED, *_scale_roles(spec.values), SHAPE)


def parts(spec: SparseSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Shapes and dtypes for a weight (O, I)."""
    known: Parts = {SHAPE: ((2,), torch.int64)}
    weights = shape[0] * shape[1]
    if spec.index_bits is None or spec.pattern is None:
        known[MASK] = ((-(-weights // 8),), torch.uint8)
    else:
        words = words_per_row(weights // spec.pattern[1], spec.index_bits)
        known[MASK] = ((words,), torch.int32)
    values = spec.values
    if isinstance(values, DenseSpec):
        known[VALUES] = ((spec.kept,), getattr(torch, values.dtype))
    else:
        known |= _codes_layout(values).parts(values, shape, scale_dtype)
        if values.type == "int":
            known[PACKED] = ((words_per_row(spec.kept, values.bits),), torch.int32)
        else:
            known[PACKED] = ((-(-spec.kept * values.bits // 8),), torch.uint8)
        known[SHAPE] = ((2,), torch.int64)
    return {role: known[role] for role in roles(spec)}


def encode(module: str, weight: WeightTensor) -> dict[str, Tensor]:
    """The stored tensors of a weight by name.

    Raises:
        ArtifactError: If a weight that the mask drops is not zero, or the mask breaks its pattern.
    """
    assert isinstance(weight, Sparse)
    spec, values, mask_OI = weight.spec, weight.values, weight.mask_OI
    if bool((values.dequantize() * ~mask_OI).any()):
        raise ArtifactError("a weight that its mask drops is not zero.", where=module)
    out = {f"{module}.{MASK}": _encode_mask(module, mask_OI, spec)}
    if isinstance(values, Dense):
        out[f"{module}.{VALUES}"] = values.weight_OI[mask_OI]
    else:
        assert isinstance(spec.values, QuantSpec)
        kept_1K = values.codes_OI[mask_OI][None]
        if isinstance(values, PackedInt):
            out[f"{module}.{PACKED}"] = pack(kept_1K, values.bits)[0]
        else:
            odd = kept_1K.shape[1] * values.bits % 8 > 0
            filled = torch.nn.functional.pad(kept_1K, (0, int(odd)))
            out[f"{module}.{PACKED}"] = pack_bytes(filled, values.bits)[0]
        whole = _codes_layout(spec.values).encode(module, values)
        out |= {f"{module}.{role}": whole[f"{module}.{role}"] for role in _scale_roles(spec.values)}
    out[f"{module}.{SHAPE}"] = torch.tensor(weight.shape, dtype=torch.int64)
    return out


def decode(tensors: Mapping[str, Tensor], module: str, spec: SparseSpec) -> Sparse:
    """The weight.

    Raises:
        ArtifactError: If a tensor is missing or not what the spec says.
    """
    rows, columns = take(tensors, module, SHAPE).tolist()
    known = parts(spec, (rows, columns), torch.float32)
    mask = take_as(tensors, module, MASK, *_asked(known, MASK))
    mask_OI = _decode_mask(mask, (rows, columns), spec)
    if int(mask_OI.sum()) != spec.kept:
        raise ArtifactError(
            f"its mask keeps {int(mask_OI.sum())} weights, config.json says {spec.kept}.",
            where=module,
        )
    values = spec.values
    if isinstance(values, DenseSpec):
        kept_K = take_as(tensors, module, VALUES, known[VALUES][0], "float")
        weight_OI = kept_K.new_zeros(rows, columns)
        weight_OI[mask_OI] = kept_K
        return Sparse(Dense(weight_OI), mask_OI, spec.pattern)
    return Sparse(_decode_codes(tensors, module, spec, values, mask_OI), mask_OI, spec.pattern)


def _decode_codes(
    tensors: Mapping[str, Tensor],
    module: str,
    spec: SparseSpec,
    values: QuantSpec,
    mask_OI: Tensor,
) -> Packed:
    """The whole weight: scales as its own layout reads them, beside codes that mean zero."""
    shape = (mask_OI.shape[0], mask_OI.shape[1])
    layout, known = _codes_layout(values), parts(spec, shape, torch.float32)
    words = take_as(tensors, module, PACKED, *_asked(known, PACKED))[None]
    whole = layout.parts(values, shape, torch.float32)
    blank = {f"{module}.{PACKED}": torch.zeros(whole[PACKED][0], dtype=whole[PACKED][1])}
    scales = {f"{module}.{r}": take(tensors, module, r) for r in _scale_roles(values)}
    size = {f"{module}.{SHAPE}": take(tensors, module, SHAPE)}
    packed = layout.decode({**blank, **scales, **size}, module, values)
    if isinstance(packed, PackedInt):
        kept_K = unpack(words, values.bits, spec.kept)[0]
        zero_OG = torch.zeros_like(packed.scale_OG) if packed.zero_OG is None else packed.zero_OG
        codes_OI = zero_OG.to(torch.int8).repeat_interleave(packed.group_size, 1)
        codes_OI[mask_OI] = kept_K
        return replace(packed, codes_OI=codes_OI)
    kept_K = unpack_bytes(words, values.bits)[0, : spec.kept]
    codes_OI = codes_of(torch.zeros(shape, device=words.device), values)
    codes_OI[mask_OI] = kept_K
    return replace(packed, codes_OI=codes_OI)


def _asked(known: Parts, role: str) -> tuple[tuple[int, ...], str]:
    shape, dtype = known[role]
    return shape, str(dtype).removeprefix("torch.")


def shape(
    module: str,
    spec: SparseSpec,
    shapes: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> tuple[int, int]:
    """(O, I): ``weight_shape`` holds it."""
    rows, columns = read(f"{module}.{SHAPE}").tolist()
    return rows, columns


@cache
def _choices(keep: int, of: int) -> tuple[Tensor, Tensor]:
    """The bit patterns of N in M in rising order, and the number of each by pattern (else -1)."""
    patterns = torch.tensor([p for p in range(1 << of) if p.bit_count() == keep])
    number = torch.full((1 << of,), -1)
    number[patterns] = torch.arange(len(patterns))
    return patterns, number


def _encode_mask(module: str, mask_OI: Tensor, spec: SparseSpec) -> Tensor:
    flat = mask_OI.flatten()
    if spec.index_bits is None or spec.pattern is None:
        bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
        return (
            (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)
        )
    keep, of = spec.pattern
    _, number = _choices(keep, of)
    place_M = torch.arange(of, device=flat.device)
    chosen = number.to(flat.device)[(flat.view(-1, of).long() << place_M).sum(1)]
    if bool((chosen < 0).any()):
        raise ArtifactError(f"its mask does not keep {keep} of every {of}.", where=module)
    offset = 1 << (spec.index_bits - 1)
    return pack((chosen - offset).to(torch.int8)[None], spec.index_bits)[0]


def _decode_mask(stored: Tensor, shape: tuple[int, int], spec: SparseSpec) -> Tensor:
    weights = shape[0] * shape[1]
    if spec.index_bits is None or spec.pattern is None:
        place_8 = torch.arange(8, dtype=torch.uint8, device=stored.device)
        flat = (stored[:, None] >> place_8) & 1
        return flat.flatten()[:weights].bool().view(shape)
    keep, of = spec.pattern
    patterns, _ = _choices(keep, of)
    codes = unpack(stored[None], spec.index_bits, weights // of)[0].long()
    chosen = codes + (1 << (spec.index_bits - 1))
    if bool((chosen >= len(patterns)).any()):
        raise ArtifactError("its mask holds a choice that does not exist.")
    bits = (
        patterns.to(stored.device)[chosen][:, None] >> torch.arange(of, device=stored.device)
    ) & 1
    return bits.bool().view(shape)
