"""Writes a GGUF file: the header first, then one tensor after the other, none of them held whole.

Sizes are known from the entries, so offsets are written before the first byte of a weight. The
file takes its name once it is whole. Read back in tests by the `gguf` package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pocketlm.core.errors import ArtifactError
from pocketlm.formats.gguf_types import NUMBERS, row_bytes
from pocketlm.formats.shards import require_room, write_durably
from pocketlm.models.gguf_header import MAGIC, SCALARS, VERSIONS

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


class Value(NamedTuple):
    """A metadata value with its kind.

    Attributes:
        kind: GGUF's number of the kind.
        value: A number, a bool or a text; a list of them where `inner` is given.
        inner: The kind of a list's values.
    """

    kind: int
    value: Any
    inner: int | None = None


def u32(value: int) -> Value:
    """A count."""
    return Value(UINT32, int(value))


def f32(value: float) -> Value:
    """A real number."""
    return Value(FLOAT32, float(value))


def flag(value: bool) -> Value:
    """A truth value."""
    return Value(BOOL, bool(value))


def text(value: str) -> Value:
    """A text."""
    return Value(STRING, value)


def array(inner: int, values: Sequence[Any]) -> Value:
    """A list of values of one kind."""
    return Value(ARRAY, list(values), inner)


@dataclass(frozen=True)
class GgufEntry:
    """A tensor to be written.

    Attributes:
        name: In llama.cpp's spelling.
        kind: Its type, such as Q4_K.
        shape: In torch's order, rows first.
        chunks: Gives its bytes in order; a chunk is used up before the next.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def bytes_stored(self) -> int:
        """Bytes of the tensor, without padding."""
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    entries: Sequence[GgufEntry],
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a file; what lay under its name is replaced once the new one is whole.

    Args:
        path: The file.
        metadata: Key → value, in the order in which they are written.
        entries: The tensors; names must be distinct.
        on_progress: Called with bytes of tensors written and in all.

    Returns:
        Bytes of the file.

    Raises:
        ArtifactError: If a name appears twice, or an entry gives other than its bytes.
        ResourceError: If the disk is full.
    """
    names = {entry.name for entry in entries}
    if len(names) != len(entries):
        raise ArtifactError("two tensors have one name in the GGUF file.", where=str(path))
    header = _header(metadata, entries)
    bytes_total = len(header) + sum(_padded(entry.bytes_stored) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    require_room(path.parent, bytes_total)
    write_durably(path, _stream(header, entries, on_progress), bytes_total)
    return bytes_total


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _stream(
    header: bytes,
    entries: Sequence[GgufEntry],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[bytes | memoryview]:
    yield header
    bytes_total, done = sum(entry.bytes_stored for entry in entries), 0
    for entry in entries:
        given = 0
        for chunk in entry.chunks():
            given += memoryview(chunk).nbytes
            yield chunk
            if on_progress is not None:
                on_progress(done + given, bytes_total)
        if given != entry.bytes_stored:
            what = f"{given} bytes came for a tensor of {entry.bytes_stored}."
            raise ArtifactError(what, where=entry.name)
        yield bytes(_padded(given) - given)
        done += given


def _header(metadata: Mapping[str, Value], entries: Sequence[GgufEntry]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), struct.pack("<I", value.kind), _encoded(value)]
    offset = 0
    for entry in entries:
        sides = entry.shape[::-1]
        parts += [_text(entry.name), struct.pack(f"<I{len(sides)}Q", len(sides), *sides)]
        parts.append(struct.pack("<IQ", NUMBERS[entry.kind], offset))
        offset += _padded(entry.bytes_stored)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _encoded(value: Value) -> bytes:
    if value.inner is None:
        return _scalar(value.kind, value.value)
    items = value.value
    start = struct.pack("<IQ", value.inner, len(items))
    if value.inner in SCALARS:
        return start + struct.pack(f"<{len(items)}{SCALARS[value.inner]}", *items)
    return start + b"".join(_scalar(value.inner, item) for item in items)


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw
