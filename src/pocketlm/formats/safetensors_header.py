"""The header of a safetensors file: built, and read with every offset checked.

A file is eight bytes of length (little-endian), that many bytes of JSON, then the tensors' bytes.
The JSON names each tensor's dtype, shape and byte range; ranges fill the file without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketlm.core.errors import ArtifactError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_AXES = 64  # of a tensor, as torch has it
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        start: Offset of its first byte from the start of the file.
        bytes_stored: Its length.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes_stored: int


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty(0, dtype=dtype).element_size()


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and JSON of a file that holds these tensors one after the other.

    Args:
        tensors: Name, dtype and shape, in the order of their bytes.

    Returns:
        Bytes whose length is a multiple of 8; the same tensors give the same bytes.

    Raises:
        ArtifactError: If a name appears twice or a dtype cannot be stored.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        if name in table:
            raise ArtifactError("the name appears twice in one file.", where=name)
        if dtype not in NAMES:
            raise ArtifactError(f"{dtype} cannot be stored in safetensors.", where=name)
        start, end = end, end + math.prod(shape) * element_bytes(dtype)
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, with every offset checked against the file.

    Args:
        path: A safetensors file.

    Returns:
        Name → place, in the order of their bytes.

    Raises:
        ArtifactError: If the file is truncated, has holes or surplus bytes, or is not safetensors.
    """
    bytes_total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if bytes_total < 8 or length > min(HEADER_LIMIT, bytes_total - 8):
            raise _broken(path, "is no safetensors file, or cut off inside its header")
        text = file.read(length)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        tensors = {name: _place(entry, 8 + length) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"has a malformed header ({str(error)[:200]})") from None
    return _in_order(path, tensors, 8 + length, bytes_total)


def _place(entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    numbers = (*shape, start, end)
    if len(shape) > MAX_AXES or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
        raise ValueError("a size or offset is no whole number, or there are too many")
    if end - start != math.prod(shape) * element_bytes(dtype):
        raise ValueError("a byte range does not fit its shape")
    return StoredTensor(dtype, shape, data_start + start, end - start)


def _in_order(
    path: Path, tensors: dict[str, StoredTensor], position: int, bytes_total: int
) -> dict[str, StoredTensor]:
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes_stored))
    for name, place in ordered:
        if place.start != position:
            raise _broken(path, f"has a hole or an overlap before '{name}'")
        position += place.bytes_stored
    if position != bytes_total:
        raise _broken(path, f"is {bytes_total} bytes long where its header tells {position}")
    return dict(ordered)


def _broken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{what}.", where=str(path), remedy="Copy or write the file again; it is damaged."
    )
