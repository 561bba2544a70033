"""Safetensors checkpoints read tensor by tensor: single file, or an index and its shards.

The header is parsed here (8 bytes of length, then JSON, then data) because every offset is checked
against the file before a byte is trusted. Pickle checkpoints are refused, never opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError, SecurityError, SourceError
from pocketlm.core.views import TensorInfo
from pocketlm.formats.onnx import GENAI_CONFIG
from pocketlm.formats.safetensors_header import read_header
from pocketlm.models.bytes import BufferPool, PositionalFile, byte_view, require_finite

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
SAMPLE_BYTES = 4096  # of each tensor's start, middle and end, for the fingerprint
REMEDY = "Download or copy the file again."


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: PositionalFile
    offset: int
    info: TensorInfo


class SafetensorsSource:
    """A TensorSource over the safetensors files of a directory.

    Args:
        directory: Holds `model.safetensors`, or an index and the shards it names.

    Raises:
        SourceError: If a file is absent, truncated or inconsistent.
        SecurityError: If there are only pickle files.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._pool = BufferPool()
        self._places: dict[str, Place] = {}
        for path, expected in _files(self.directory):
            self._add_file(path, expected)
        self._infos = {name: place.info for name, place in self._places.items()}

    def _add_file(self, path: Path, expected: set[str]) -> None:
        file = PositionalFile(path)
        places = _read_places(file)
        missing = sorted(expected - places.keys())
        if missing:
            what = f"lacks tensor '{missing[0]}' that the index places here."
            raise SourceError(what, where=str(path), remedy=REMEDY)
        twice = sorted(self._places.keys() & places.keys())
        if twice:
            what = f"holds tensor '{twice[0]}' that another shard holds too."
            raise SourceError(what, where=str(path), remedy=REMEDY)
        self._places.update(places)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, file by file in the order of their bytes."""
        return self._infos

    def _place(self, name: str) -> Place:
        place = self._places.get(name)
        if place is None:
            raise SourceError(f"holds no tensor '{name}'.", where=str(self.directory))
        return place

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU; the caller owns the memory.

        Raises:
            SourceError: If it is absent, cut off, or not finite.
        """
        info = self._place(name).info
        if not info.shape:
            return self._read_range(name, 0, 1, ())
        return self._read_range(name, 0, info.shape[0], info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of the first axis; the caller owns the memory.

        Raises:
            SourceError: If they are cut off or not finite.
        """
        info = self._place(name).info
        return self._read_range(name, start, stop, (stop - start, *info.shape[1:]))

    def _read_range(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        place = self._place(name)
        tensor = torch.empty(shape, dtype=place.info.dtype)
        if tensor.numel() == 0:
            return tensor
        row_bytes = tensor.numel() * tensor.element_size() // (stop - start)
        place.file.read_into(byte_view(tensor), place.offset + start * row_bytes)
        require_finite(name, tensor, str(place.file.path))
        return tensor

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[memoryview]:
        """The tensor's raw bytes in order; a chunk is valid until the next one.

        Args:
            name: The tensor.
            bytes_at_once: The largest chunk; rounded down to whole elements of 8 bytes.

        Yields:
            Views of one reused buffer.
        """
        place = self._place(name)
        total = place.info.bytes_stored
        step = max(8, bytes_at_once // 8 * 8)
        with self._pool.borrow(min(step, total)) as buffer:
            view = byte_view(buffer)
            for start in range(0, total, step):
                piece = view[: min(step, total - start)]
                place.file.read_into(piece, place.offset + start)
                yield piece

    def fingerprint(self) -> str:
        """A digest of names, dtypes, shapes and of bytes at each tensor's start, middle and end."""
        digest = hashlib.sha256()
        for name in sorted(self._places):
            place = self._places[name]
            info, total = place.info, place.info.bytes_stored
            digest.update(repr((name, str(info.dtype), info.shape)).encode())
            length = min(SAMPLE_BYTES, total)
            with self._pool.borrow(length) as buffer:
                for start in sorted({0, (total - length) // 2, total - length}):
                    place.file.read_into(byte_view(buffer), place.offset + start)
                    digest.update(byte_view(buffer))
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the files."""
        for file in {id(p.file): p.file for p in self._places.values()}.values():
            file.close()


def _files(directory: Path) -> list[tuple[Path, set[str]]]:
    """The files of a checkpoint, each with the tensors that an index expects in it."""
    if (directory / SINGLE).is_file():
        return [(directory / SINGLE, set())]
    index = directory / INDEX
    if index.is_file():
        return _shards(index)
    pickles = sorted(p.name for pattern in PICKLE_PATTERNS for p in directory.glob(pattern))
    if pickles:
        convert = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained(r'{directory}').save_pretrained(r'{directory}-safe')"
        )
        raise SecurityError(
            f"the weights are in a pickle file ({pickles[0]}), which can run any code when opened.",
            where=str(directory),
            remedy=f'Convert it where you trust it: python -c "{convert}"',
        )
    if (directory / GENAI_CONFIG).is_file():
        raise SourceError(
            "is a directory of ONNX Runtime GenAI, which is written here and not read again.",
            where=str(directory),
            remedy="Give what it was made of; pocketlm/export.json names it.",
        )
    raise SourceError(
        f"holds neither {SINGLE} nor {INDEX}.",
        where=str(directory),
        remedy="Give the directory of a Hugging Face checkpoint with safetensors weights.",
    )


def _shards(index: Path) -> list[tuple[Path, set[str]]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            shards.setdefault(file, set()).add(tensor)
        if not shards or not all(isinstance(file, str) for file in shards):
            raise ValueError("no file is named")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError("is no valid index.", where=str(index), remedy=REMEDY) from error
    for file in shards:
        if PurePath(file).name != file or PureWindowsPath(file).name != file or "\0" in file:
            raise SourceError(f"names '{file}', outside the directory.", where=str(index))
        if not (index.parent / file).is_file():
            what = f"names shard '{file}', which is absent."
            raise SourceError(what, where=str(index), remedy="Download the missing shard.")
    return [(index.parent / file, shards[file]) for file in sorted(shards)]


def _read_places(file: PositionalFile) -> dict[str, Place]:
    try:
        stored = read_header(file.path)
    except ArtifactError as error:
        raise SourceError(error.what, where=str(file.path), remedy=REMEDY) from error
    return {
        name: Place(file, tensor.start, TensorInfo(name, tensor.dtype, tensor.shape))
        for name, tensor in stored.items()
    }
