"""The header of a GGUF file: metadata and the table of tensors, every length checked on the way.

It is parsed here rather than by the gguf library because that takes many seconds for a vocabulary
and trusts lengths that a damaged file may state.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pocketlm.core.errors import SourceError
from pocketlm.models.bytes import PositionalFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PIECE_BYTES = 1 << 20
HEADER_BYTES = 256 << 20  # the largest vocabularies take a tenth of it
MAX_NESTING = 4  # of lists in lists; llama.cpp writes none
REMEDY = "Download or copy the file again."
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
UINT32, STRING, ARRAY = 4, 8, 9
F32 = 0


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the file stores it.

    Attributes:
        name: In llama.cpp's spelling.
        shape: In torch's order.
        kind: ggml's number of its type.
        offset: Of its first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """How many values it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        metadata: Key → value; arrays are lists.
        tensors: In the order of the file.
        raw: Key → the bytes of its entry, to write a smaller header with.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    raw: Mapping[str, bytes]


class Cursor:
    """Reads a file from its start, piece by piece, never past its end.

    Args:
        file: The file.
    """

    def __init__(self, file: PositionalFile) -> None:
        self._file, self._data, self.position = file, bytearray(), 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            SourceError: If the file ends before.
        """
        end = self.position + count
        if count < 0 or end > self._file.bytes_total:
            raise damaged(self._file, "ends inside its header")
        if end > HEADER_BYTES:  # a wrong length would read weights, perhaps all of them
            raise damaged(self._file, f"has a header of more than {HEADER_BYTES >> 20} MiB")
        while len(self._data) < end:
            have = len(self._data)
            more = min(max(PIECE_BYTES, end - have), self._file.bytes_total - have)
            self._data.extend(bytes(more))
            with memoryview(self._data) as view:
                self._file.read_into(view[have:], have)
        start, self.position = self.position, end
        return bytes(self._data[start:end])

    def number(self, code: str) -> Any:
        """The next little-endian number of a struct code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, bytes_each: int) -> int:
        """The next 64-bit count of things that take at least `bytes_each` bytes."""
        value = self.number("Q")
        if value * bytes_each > self._file.bytes_total - self.position:
            raise damaged(self._file, f"states a count of {value}, more than it has bytes for")
        return value

    def string(self) -> str:
        """The next string."""
        return self.take(self.count(1)).decode("utf-8", "replace")

    def value(self, kind: int, nesting: int = 0) -> Any:
        """The next metadata value of a kind.

        Raises:
            SourceError: If the kind is unknown, or the value is not whole.
        """
        if nesting > MAX_NESTING:
            raise damaged(self._file, "holds lists in lists without end")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise damaged(self._file, f"holds metadata of unknown kind {kind}")
        inner = self.number("I")
        if inner in SCALARS:
            each = struct.calcsize(f"<{SCALARS[inner]}")
            length = self.count(each)
            return list(struct.unpack(f"<{length}{SCALARS[inner]}", self.take(length * each)))
        return [self.value(inner, nesting + 1) for _ in range(self.count(8))]


def damaged(file: PositionalFile, what: str) -> SourceError:
    """The error for a file that contradicts itself."""
    return SourceError(f"{what}.", where=str(file.path), remedy=f"It is damaged. {REMEDY}")


def read_header(file: PositionalFile) -> GgufHeader:
    """Parses a GGUF file's header.

    Args:
        file: The file.

    Returns:
        Its metadata and tensors; no weight is read.

    Raises:
        SourceError: If it is no GGUF file, truncated or damaged.
    """
    cursor = Cursor(file)
    if file.bytes_total < 24 or cursor.take(4) != MAGIC:
        raise SourceError("is no GGUF file.", where=str(file.path), remedy=REMEDY)
    version = cursor.number("I")
    if version not in VERSIONS:
        what = f"is GGUF version {version}; read are 2 and 3."
        raise SourceError(what, where=str(file.path), remedy=REMEDY)
    tensor_count, key_count = cursor.count(24), cursor.count(12)
    metadata: dict[str, Any] = {}
    raw: dict[str, bytes] = {}
    for _ in range(key_count):
        start = cursor.position
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
        end, cursor.position = cursor.position, start
        raw[key] = cursor.take(end - start)
    table = [_table_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(file, f"states an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(GgufTensor(name, shape, kind, start + at) for name, shape, kind, at in table)
    return GgufHeader(metadata, tensors, raw)


def _table_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = cursor.string(), cursor.number("I")
    if dims > 4:
        raise damaged(cursor._file, f"gives tensor '{name}' {dims} axes")
    shape = tuple(cursor.number("Q") for _ in range(dims))
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def write_small_header(
    header: GgufHeader, path: Path, without: tuple[str, ...], more: Mapping[str, int]
) -> None:
    """Writes a GGUF file with the same metadata and tensor names, but no weights.

    transformers turns metadata into a configuration; given this file it need not walk a vocabulary.

    Args:
        header: Of the real file.
        path: Where to write.
        without: Metadata keys to leave out.
        more: Numbers to add where the file does not state them.
    """
    kept = [entry for key, entry in header.raw.items() if key not in without]
    added = {key: value for key, value in more.items() if key not in header.metadata}
    kept += [_string(key) + struct.pack("<II", UINT32, value) for key, value in added.items()]
    with path.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(header.tensors), len(kept)))
        out.writelines(kept)
        for tensor in header.tensors:
            out.write(_string(tensor.name) + struct.pack("<IQIQ", 1, 0, F32, 0))
        out.write(bytes(64))  # padding up to where data would start


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
