"""Damaged GGUF files: whatever the bytes, a typed error or a header, and no large allocation."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.models.test_gguf import write

from pocketlm.core.errors import PocketLMError, SourceError
from pocketlm.models import open_model
from pocketlm.models.bytes import PositionalFile
from pocketlm.models.gguf_header import HEADER_BYTES, Cursor, read_header

MOST_BYTES = 16 << 20  # of memory that reading a small file may take
ABSURD = (0, 1, 31, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SLOW = settings(QUICK, max_examples=25)


@cache
def whole(folder: Path) -> bytes:
    return write(folder / "whole.gguf").read_bytes()


def reads(path: Path, data: bytes) -> bool:
    """Whether a header comes out; anything but a typed error, or much memory, fails the test."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read_header(PositionalFile(path))
        return True
    except SourceError as error:
        return path.name not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES


@QUICK
@given(data=st.binary(max_size=300))
def test_any_bytes_behind_the_magic(tmp_path: Path, data: bytes) -> None:
    version = struct.pack("<I", 3)
    reads(tmp_path / "any.gguf", b"GGUF" + version + data)
    assert not reads(tmp_path / "any.gguf", data[:20])


@QUICK
@given(at=st.integers(4, 1500), value=st.sampled_from(ABSURD), width=st.sampled_from("IQ"))
def test_absurd_numbers_anywhere(tmp_path: Path, at: int, value: int, width: str) -> None:
    raw = whole(tmp_path.parent)
    number = struct.pack(f"<{width}", value % (1 << (8 * struct.calcsize(width))))
    reads(tmp_path / "one.gguf", raw[:at] + number + raw[at + len(number) :])


@QUICK
@given(length=st.integers(0, 1500))
def test_cut_anywhere(tmp_path: Path, length: int) -> None:
    assert not reads(tmp_path / "cut.gguf", whole(tmp_path.parent)[:length])


@SLOW
@given(at=st.integers(24, 2000), value=st.integers(0, 255))
def test_a_changed_byte_opens_or_is_named(tmp_path: Path, at: int, value: int) -> None:
    raw = bytearray(whole(tmp_path.parent))
    raw[at] = value
    path = tmp_path / "byte.gguf"
    path.write_bytes(raw)
    with suppress(PocketLMError):
        open_model(path)


def test_lists_in_lists(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 5000
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path = tmp_path / "nested.gguf"
    path.write_bytes(data + struct.pack("<I", 9) + nested)
    with pytest.raises(SourceError, match="without end"):
        read_header(PositionalFile(path))


def test_a_length_that_spans_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    with path.open("wb") as file:
        file.truncate(2 * HEADER_BYTES)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(SourceError, match="256 MiB"):
        Cursor(PositionalFile(path)).take(HEADER_BYTES + 1)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()
