"""Safetensors read by our own parser: the library's values, and a clear error for every damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketlm.core.errors import SecurityError, SourceError
from pocketlm.models.stream import INDEX, SINGLE, SafetensorsSource

TENSORS = {
    "a.weight": torch.arange(60, dtype=torch.float32).view(6, 10) / 7,
    "b.weight": torch.randn(33, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.bias": torch.randn(7, generator=torch.Generator().manual_seed(1)).half(),
    "d.ids": torch.arange(4),
    "e.empty": torch.empty(0, 3),
    "f.scalar": torch.tensor(2.5),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


def test_reads_what_the_library_wrote(directory: Path) -> None:
    source = SafetensorsSource(directory)
    for name, expected in load_file(directory / SINGLE).items():
        got = source.read(name)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert source.infos()[name].shape == tuple(expected.shape)


def test_rows_and_chunks(directory: Path) -> None:
    source = SafetensorsSource(directory)
    assert torch.equal(source.rows("b.weight", 3, 9), TENSORS["b.weight"][3:9])
    pieces = [bytes(piece) for piece in source.chunks("b.weight", 50)]
    assert max(map(len, pieces)) <= 50
    assert b"".join(pieces) == TENSORS["b.weight"].view(torch.uint8).numpy().tobytes()


def test_two_chunk_streams_do_not_share_a_buffer(directory: Path) -> None:
    source = SafetensorsSource(directory)
    for first, second in zip(
        source.chunks("a.weight", 40), source.chunks("b.weight", 40), strict=False
    ):
        assert bytes(first) != bytes(second)


def test_fingerprint_follows_content(directory: Path) -> None:
    before = SafetensorsSource(directory).fingerprint()
    assert before == SafetensorsSource(directory).fingerprint()
    changed = {**TENSORS, "a.weight": TENSORS["a.weight"] + 1}
    save_file(changed, directory / SINGLE)
    assert SafetensorsSource(directory).fingerprint() != before


def test_shards(tmp_path: Path) -> None:
    names = list(TENSORS)
    save_file({n: TENSORS[n] for n in names[:2]}, tmp_path / "x-1.safetensors")
    save_file({n: TENSORS[n] for n in names[2:]}, tmp_path / "x-2.safetensors")
    weight_map = {n: "x-1.safetensors" if n in names[:2] else "x-2.safetensors" for n in names}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(source.read(n), TENSORS[n]) for n in names)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"x-2\.safetensors.*absent"):
        SafetensorsSource(tmp_path)


def test_index_that_leaves_the_directory(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(SourceError, match="outside"):
        SafetensorsSource(tmp_path)


def test_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    weight_map = {"a": "x.safetensors", "b": "x.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match="lacks tensor 'b'"):
        SafetensorsSource(tmp_path)


def cut(raw: bytes) -> bytes:
    return raw[:-3]


def cut_header(raw: bytes) -> bytes:
    return raw[:20]


def cut_to_nothing(raw: bytes) -> bytes:
    return raw[:5]


def absurd_length(raw: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + raw[8:]


def no_json(raw: bytes) -> bytes:
    return raw[:8] + b"x" + raw[9:]


def too_long(raw: bytes) -> bytes:
    return raw + bytes(8)


def edit_header(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edited(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return edited


@edit_header
def overlap(header: dict) -> None:
    header["b.weight"]["data_offsets"] = header["a.weight"]["data_offsets"]


@edit_header
def overrun(header: dict) -> None:
    header["b.weight"]["data_offsets"][1] += 1 << 40


@edit_header
def wrong_shape(header: dict) -> None:
    header["a.weight"]["shape"] = [6, 11]


@edit_header
def negative(header: dict) -> None:
    header["a.weight"]["shape"] = [-6, -10]


@edit_header
def unknown_dtype(header: dict) -> None:
    header["a.weight"]["dtype"] = "Q3"


DAMAGES = [cut, cut_header, cut_to_nothing, absurd_length, no_json, too_long]
DAMAGES += [overlap, overrun, wrong_shape, negative, unknown_dtype]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    file = directory / SINGLE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SourceError, match=SINGLE) as caught:
        SafetensorsSource(directory)
    assert caught.value.remedy


def test_file_that_shrinks_while_open(directory: Path) -> None:
    source = SafetensorsSource(directory)
    with (directory / SINGLE).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 200)
    last = max(
        source.infos(), key=lambda name: source._places[name].offset * bool(name != "e.empty")
    )
    with pytest.raises(SourceError, match="ends at byte"):
        source.read(last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[31, 4] = value
    save_file({"layer.weight": weight}, tmp_path / SINGLE)
    with pytest.raises(SourceError, match=r"layer\.weight.*NaN or infinite"):
        SafetensorsSource(tmp_path).read("layer.weight")


def test_pickle_is_refused_with_a_command(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SecurityError, match="save_pretrained"):
        SafetensorsSource(tmp_path)


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds neither"):
        SafetensorsSource(tmp_path)
