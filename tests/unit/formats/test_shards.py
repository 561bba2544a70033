"""Files that the safetensors library reads, streamed; a full disk leaves nothing behind."""

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.unit.formats.artifacts import entry

from pocketlm.core.errors import ArtifactError, ResourceError
from pocketlm.formats import shards
from pocketlm.formats.safetensors_header import read_header
from pocketlm.formats.shards import Entry, assemble, write_file, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd": torch.randn(3, 7).bfloat16(),  # 42 bytes: what follows must be aligned all the same
        "codes": torch.randint(-8, 8, (5, 3), dtype=torch.int8),
        "wide": torch.randn(9, 5),
        "shape": torch.tensor([5, 3]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "half": torch.randn(11).half(),
        "näme": torch.ones(2, dtype=torch.int32),
    }


def entries() -> list[Entry]:
    return [entry(name, tensor) for name, tensor in tensors().items()]


def test_the_library_reads_one_file(tmp_path: Path) -> None:
    digests = assemble(tmp_path, entries())
    path = tmp_path / "model.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert digests == {"model.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    loaded = load_file(path)
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_headers_read_back_with_aligned_places(tmp_path: Path) -> None:
    assemble(tmp_path, entries())
    places = read_header(tmp_path / "model.safetensors")
    assert places.keys() == tensors().keys()
    for name, place in places.items():
        assert place.shape == tuple(tensors()[name].shape)
        assert place.start % tensors()[name].element_size() == 0


def test_shards_hold_at_most_what_was_asked(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    digests = assemble(tmp_path, entries(), 100, lambda *done: progress.append(done))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.element_size() for t in tensors().values())
    assert index["metadata"]["total_size"] == total
    assert progress[-1] == (total, total)
    assert index["weight_map"].keys() == tensors().keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert digests.keys() == {path.name for path in tmp_path.iterdir()}
    for path in files:
        loaded = load_file(path)
        assert {n for n, owner in index["weight_map"].items() if owner == path.name} == set(loaded)
        size = sum(t.numel() * t.element_size() for t in loaded.values())
        assert size <= 100 or len(loaded) == 1


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    first = assemble(tmp_path / "a", entries(), 100)
    assert assemble(tmp_path / "b", entries(), 100) == first
    assert assemble(tmp_path / "a", entries(), 100) == first  # over itself


def test_an_entry_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    short = Entry("x", torch.float32, (4,), lambda: iter([b"1234567"]))
    with pytest.raises(ArtifactError, match="x: 7 bytes came for a tensor of 16"):
        assemble(tmp_path, [short])
    assert list(tmp_path.iterdir()) == []


def test_a_name_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="wide: two tensors"):
        assemble(tmp_path, [*entries(), entry("wide", torch.ones(1))])


def test_a_disk_that_fills_up_names_the_bytes(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1234"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"the disk is full: 8 bytes .*-o") as caught:
        assemble(tmp_path, [Entry("x", torch.int8, (8,), chunks)])
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shards.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="10 are free"):
        assemble(tmp_path, entries())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_file(path, b"old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_durably(path, chunks(), 3)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert write_file(path, b"new") == hashlib.sha256(b"new").hexdigest()
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_damaged_header_is_an_error(tmp_path: Path, cut: int) -> None:
    assemble(tmp_path, entries())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match="damaged"):
        read_header(path)


def test_holes_and_overlaps_are_errors(tmp_path: Path) -> None:
    def write(first: list[int], second: list[int], data: int) -> Path:
        header = {
            name: {"dtype": "I8", "shape": [end - start], "data_offsets": [start, end]}
            for name, (start, end) in {"a": first, "b": second}.items()
        }
        text = json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
        return path

    assert len(read_header(write([0, 4], [4, 8], 8))) == 2
    for first, second, data in (([0, 4], [5, 8], 8), ([0, 4], [3, 8], 8), ([0, 4], [4, 8], 9)):
        with pytest.raises(ArtifactError, match="damaged"):
            read_header(write(first, second, data))


def test_tensors_are_written_from_memory(tmp_path: Path) -> None:
    given = {**tensors(), "mask": torch.rand(2, 5) < 0.5, "turned": torch.randn(4, 6).T}
    digest = write_tensors(tmp_path / "block.safetensors", given)
    assert digest == hashlib.sha256((tmp_path / "block.safetensors").read_bytes()).hexdigest()
    found = load_file(tmp_path / "block.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
