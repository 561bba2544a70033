"""Integer codes ↔ int32 words, densely: the bit layout of compressed-tensors' ``pack-quantized``.

Along a row, code i (plus 2^(bits-1), so that it is unsigned) holds the bits i·bits to
(i+1)·bits - 1 of a little-endian bit stream; the stream is cut into int32 words and its last word
filled with zeros. 32 codes take exactly `bits` words, and a code may lie across two words (3, 5, 6
and 7 bits).

Eight codes fill `bits` whole bytes. So eight code bytes are read as one int64 and their lanes are
moved together in three steps (8 → 16 → 32 → 64 bits), each a mask, a shift and an or.
Little-endian hosts only, as everything that torch runs on. Codes of floats lie in plain bytes.

Legend: R rows, C codes of a row, W words of a row.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError

CODES_AT_ONCE = 1 << 19  # of a chunk of rows: its int64 scratch stays in the second-level cache
CUDA_CODES_AT_ONCE = 1 << 25  # a GPU hides its memory behind more work


def words_per_row(codes: int, bits: int) -> int:
    """int32 words that a row of codes takes: ⌈codes · bits / 32⌉."""
    return -(-codes * bits // 32)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Packs each row of codes.

    Args:
        codes_RC: int8 [R, C], from -2^(bits-1) to 2^(bits-1)-1.
        bits: Bits of a code, 2 to 8.

    Returns:
        int32 [R, ⌈C·bits/32⌉].

    Raises:
        ArtifactError: If the tensor is no int8 matrix or a code does not fit into `bits`.
    """
    _check_input(codes_RC, torch.int8, bits)
    rows, columns = codes_RC.shape
    words_RW = codes_RC.new_empty(rows, words_per_row(columns, bits), dtype=torch.int32)
    if words_RW.numel() == 0:
        return words_RW
    smallest, largest = (int(end) for end in torch.aminmax(codes_RC))
    offset = 1 << (bits - 1)
    if smallest < -offset or largest >= offset:
        raise ArtifactError(
            f"codes run from {smallest} to {largest} and do not fit into {bits} bits.",
            remedy="Clamp the codes to the grid before they are packed.",
        )
    padded = -(-columns // 32) * 32
    step = max(1, _codes_at_once(codes_RC) // padded)
    for start in range(0, rows, step):
        chunk = codes_RC[start : start + step].contiguous().view(torch.uint8) + offset
        if padded > columns:
            chunk = torch.nn.functional.pad(chunk, (0, padded - columns))
        # Flat views throughout: a single row may have odd strides and still be contiguous.
        lanes = _squeeze_lanes(chunk.flatten().view(torch.int64), bits)
        stream = lanes.view(torch.uint8).view(-1, 8)[:, :bits]  # the eight codes' own bytes
        words = stream.flatten().view(torch.int32).view(chunk.shape[0], -1)
        words_RW[start : start + step] = words[:, : words_RW.shape[1]]
    return words_RW


def unpack(words_RW: Tensor, bits: int, codes: int) -> Tensor:
    """Takes the codes out of each row of words again.

    Args:
        words_RW: int32 [R, ⌈codes·bits/32⌉].
        bits: Bits of a code, 2 to 8.
        codes: C, codes of a row.

    Returns:
        int8 [R, C].

    Raises:
        ArtifactError: If the tensor is no int32 matrix or its width is not that of `codes` codes.
    """
    _check_input(words_RW, torch.int32, bits)
    rows, words = words_RW.shape
    if words != words_per_row(codes, bits):
        raise ArtifactError(
            f"rows of {words} words where {codes} codes of {bits} bits take "
            f"{words_per_row(codes, bits)}.",
            remedy="The file was not packed densely; write it again with a current release.",
        )
    codes_RC = words_RW.new_empty(rows, codes, dtype=torch.int8)
    if codes_RC.numel() == 0:
        return codes_RC
    padded_words = -(-words // bits) * bits
    step = max(1, _codes_at_once(words_RW) // (padded_words * 32 // bits))
    for start in range(0, rows, step):
        chunk = words_RW[start : start + step]
        if padded_words > words:
            chunk = torch.nn.functional.pad(chunk, (0, padded_words - words))
        stream = chunk.flatten().view(torch.uint8).view(-1, bits)
        eights = stream.new_zeros(stream.shape[0], 8)
        eights[:, :bits] = stream
        spread = _spread_lanes(eights.flatten().view(torch.int64), bits).view(torch.uint8)
        codes_RC[start : start + step] = (
            spread.view(chunk.shape[0], -1)[:, :codes].sub_(1 << (bits - 1)).view(torch.int8)
        )
    return codes_RC


def _codes_at_once(matrix: Tensor) -> int:
    return CUDA_CODES_AT_ONCE if matrix.is_cuda else CODES_AT_ONCE


def pack_bytes(codes_RC: Tensor, bits: int) -> Tensor:
    """Codes as bytes, the first in the lowest bits: two of 4 bits in one, eight of 3 bits in three.

    Args:
        codes_RC: uint8 [R, C], C as `fills_bytes` wants it.
        bits: 2 to 6, or 8.

    Returns:
        uint8 [R, C·bits/8].
    """
    if bits == 8:
        return codes_RC
    if bits == 4:
        return codes_RC[:, ::2] | (codes_RC[:, 1::2] << 4)
    lanes = _squeeze_lanes(codes_RC.contiguous().flatten().view(torch.int64), bits)
    return lanes.view(torch.uint8).view(-1, 8)[:, :bits].reshape(codes_RC.shape[0], -1)


def fills_bytes(columns: int, bits: int) -> bool:
    """Whether a row of codes can be cut into what `pack_bytes` packs together."""
    return columns % {8: 1, 4: 2}.get(bits, 8) == 0


def unpack_bytes(bytes_RB: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 [R, C]."""
    if bits == 8:
        return bytes_RB
    if bits != 4:
        eights = bytes_RB.new_zeros(bytes_RB.numel() // bits, 8)
        eights[:, :bits] = bytes_RB.reshape(-1, bits)
        lanes = _spread_lanes(eights.flatten().view(torch.int64), bits)
        return lanes.view(torch.uint8).view(bytes_RB.shape[0], -1)
    return torch.stack([bytes_RB & 0xF, bytes_RB >> 4], dim=-1).flatten(1)


def padding_is_zero(words_RW: Tensor, bits: int, codes: int) -> bool:
    """Whether the bits behind a row's last code are all zero, as the layout has it.

    Args:
        words_RW: int32 [R, ⌈codes·bits/32⌉].
        bits: Bits of a code.
        codes: C, codes of a row.
    """
    used = codes * bits - 32 * (words_RW.shape[1] - 1)  # bits of the last word
    if used == 32 or words_RW.numel() == 0:
        return True
    return not bool((words_RW[:, -1] & _signed(0xFFFFFFFF ^ ((1 << used) - 1), 32)).any())


def _squeeze_lanes(lanes: Tensor, bits: int) -> Tensor:
    """Moves eight 8-bit lanes of an int64 together into its lowest 8·bits bits."""
    for lane in (8, 16, 32):  # width of a lane before the step
        kept = lane // 8 * bits  # bits in use in it
        low = _repeat((1 << kept) - 1, 2 * lane)
        high = _repeat(((1 << kept) - 1) << kept, 2 * lane)
        lanes = (lanes & low).bitwise_or_((lanes >> (lane - kept)).bitwise_and_(high))
    return lanes


def _spread_lanes(lanes: Tensor, bits: int) -> Tensor:
    """The inverse of `_squeeze_lanes`."""
    for lane in (32, 16, 8):
        kept = lane // 8 * bits
        low = _repeat((1 << kept) - 1, 2 * lane)
        high = _repeat(((1 << kept) - 1) << lane, 2 * lane)
        lanes = (lanes & low).bitwise_or_((lanes << (lane - kept)).bitwise_and_(high))
    return lanes


def _repeat(mask: int, width: int) -> int:
    """A mask repeated every `width` bits of an int64, as the signed number torch wants."""
    return _signed(sum(mask << shift for shift in range(0, 64, width)), 64)


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def _check_input(matrix: Tensor, dtype: torch.dtype, bits: int) -> None:
    if sys.byteorder != "little":
        raise ArtifactError("packing needs a little-endian machine.")
    if matrix.dtype is not dtype or matrix.dim() != 2:
        raise ArtifactError(f"expected a {dtype} matrix, got {matrix.dtype} {tuple(matrix.shape)}.")
    if not 2 <= bits <= 8:
        raise ArtifactError(f"codes of {bits} bits cannot be packed; 2 to 8 can.")
