"""Whatever stands in a header or an index: a clear error, little memory, no file elsewhere."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pocketlm.core.errors import ArtifactError, SourceError
from pocketlm.formats.safetensors_header import read_header
from pocketlm.models.stream import INDEX, SINGLE, SafetensorsSource

WHOLE = save({"a.weight": torch.ones(4, 6), "b": torch.arange(5)}, metadata={"format": "pt"})
PEAK_BYTES = 4 << 20
FEW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.one_of(st.integers(), st.just(1 << 62), st.floats(), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "Q9", "F8_E4M3"]) | VALUES,
        "shape": st.lists(NUMBERS, max_size=70) | VALUES,
        "data_offsets": st.lists(NUMBERS, max_size=3) | VALUES,
    },
)
HEADERS = st.dictionaries(st.text(max_size=8), ENTRIES | VALUES, max_size=4) | VALUES


def read_both(path: Path) -> None:
    """Both readers: a file is either sound, or refused by name with little memory."""
    tracemalloc.start()
    try:
        for read, kind in ((SafetensorsSource, SourceError), (read_header, ArtifactError)):
            said = SINGLE
            try:
                found = read(path.parent if read is SafetensorsSource else path)
                if isinstance(found, SafetensorsSource):
                    found.close()
            except kind as error:
                said = str(error)
            assert SINGLE in said
            assert len(said) < 1000
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


@FEW
@given(header=HEADERS, data=st.binary(max_size=64))
@example(header={"a": {"dtype": "F32", "shape": [1 << 62] * 60, "data_offsets": [0, 8]}}, data=b"")
def test_any_header(tmp_path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    read_both(tmp_path / SINGLE)


@FEW
@given(place=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), end=st.integers(0, 400))
def test_any_byte_changed_and_any_length(tmp_path: Path, place: int, byte: int, end: int) -> None:
    raw = WHOLE[:place] + bytes([byte]) + WHOLE[place + 1 :]
    (tmp_path / SINGLE).write_bytes(raw[:end])
    read_both(tmp_path / SINGLE)


@FEW
@given(length=st.integers(0, 2**64 - 1))
def test_any_length_of_the_header(tmp_path: Path, length: int) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + WHOLE[8:])
    read_both(tmp_path / SINGLE)


def test_deep_nesting(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(SourceError, match="malformed header"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ArtifactError, match="malformed header"):
        read_header(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(SourceError, match="no valid index"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", "", "c:\\x", "..\\x", "\0"]
)
def test_an_index_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path.parent / "x.safetensors").write_bytes(WHOLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(SourceError, match=r"outside the directory|absent"):
        SafetensorsSource(tmp_path)


@FEW
@given(content=VALUES | st.fixed_dictionaries({"weight_map": VALUES}))
def test_any_index(tmp_path: Path, content: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"index\.json"):
        SafetensorsSource(tmp_path)
