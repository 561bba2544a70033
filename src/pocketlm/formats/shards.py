"""Writes safetensors files from streams of bytes: no tensor is ever held whole.

Sizes are known from the entries, so headers are written first and the bytes follow chunk by chunk,
hashed on their way. Each file is written beside its final name, synced, renamed, and the directory
synced: a name that exists is complete. The same entries give the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError, ResourceError
from pocketlm.formats.safetensors_header import build_header, element_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTIAL = ".part"  # suffix of a file that is being written
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype.
        shape: Its shape.
        chunks: Gives the raw little-endian bytes in order; a chunk is used up before the next.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def bytes_stored(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * element_bytes(self.dtype)


def assemble(
    directory: Path | str,
    entries: Sequence[Entry],
    max_shard_bytes: float = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Writes all tensors, and the index where they need several files.

    Tensors stay in the order given from shard to shard; inside a shard those of wide elements come
    first (stable), so that each is aligned to its element size.

    Args:
        directory: Where to; created if absent.
        entries: The tensors; names must be distinct.
        max_shard_bytes: Data bytes of one file; a larger tensor gets a file of its own.
        on_progress: Called with bytes written and bytes in all.

    Returns:
        File name → sha256 of its bytes, the index included.

    Raises:
        ResourceError: If the disk is full; what was being written is removed.
        ArtifactError: If a name appears twice or an entry gives other than its size in bytes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = [_aligned(shard) for shard in _split(entries, max_shard_bytes)]
    owners = _owners(shards)
    bytes_total = sum(entry.bytes_stored for entry in entries)
    require_room(directory, bytes_total)
    digests: dict[str, str] = {}
    bytes_done = 0
    for index, shard in enumerate(shards):
        name = _file_name(index, len(shards))

        def report(count: int, done_before: int = bytes_done) -> None:
            if on_progress is not None:
                on_progress(done_before + count, bytes_total)

        digests[name] = write_durably(directory / name, _stream(shard, report), bytes_total)
        bytes_done += sum(entry.bytes_stored for entry in shard)
    if len(shards) > 1:
        weight_map = {name: _file_name(owner, len(shards)) for name, owner in owners.items()}
        index_data = {"metadata": {"total_size": bytes_total}, "weight_map": weight_map}
        text = json.dumps(index_data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        digests[INDEX] = write_durably(directory / INDEX, [text.encode()], len(text))
    return digests


def write_file(path: Path | str, data: bytes) -> str:
    """Writes a small file so that it is either absent or complete, whatever happens.

    Args:
        path: Where to.
        data: Its bytes.

    Returns:
        The sha256 of the bytes.

    Raises:
        ResourceError: If the disk is full.
    """
    return write_durably(Path(path), [data], len(data))


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor]) -> str:
    """Writes one safetensors file straight from memory: either absent or complete.

    Args:
        path: Where to.
        tensors: By name, on any device.

    Returns:
        The sha256 of its bytes.

    Raises:
        ResourceError: If the disk is full.
    """
    entries = _aligned([_entry(name, tensor) for name, tensor in tensors.items()])
    bytes_total = sum(entry.bytes_stored for entry in entries)
    return write_durably(Path(path), _stream(entries, lambda count: None), bytes_total)


def _entry(name: str, tensor: Tensor) -> Entry:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: iter([flat.numpy().data]))


def _split(entries: Sequence[Entry], max_shard_bytes: float) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes_stored > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes_stored
    return shards


def _aligned(shard: list[Entry]) -> list[Entry]:
    return sorted(shard, key=lambda entry: -element_bytes(entry.dtype))


def _owners(shards: list[list[Entry]]) -> dict[str, int]:
    owners: dict[str, int] = {}
    for index, shard in enumerate(shards):
        for entry in shard:
            if entry.name in owners:
                raise ArtifactError("two tensors have this name.", where=entry.name)
            owners[entry.name] = index
    return owners


def _file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _stream(shard: list[Entry], report: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    yield build_header((entry.name, entry.dtype, entry.shape) for entry in shard)
    done = 0
    for entry in shard:
        given = 0
        for chunk in entry.chunks():
            given += memoryview(chunk).nbytes
            yield chunk
            report(done + given)
        if given != entry.bytes_stored:
            raise ArtifactError(
                f"{given} bytes came for a tensor of {entry.bytes_stored}.", where=entry.name
            )
        done += given


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], bytes_needed: int) -> str:
    """Writes a file beside its name, syncs it and renames it: it is absent or complete.

    Args:
        path: Where to.
        chunks: Its bytes in order.
        bytes_needed: How many they are, for the error where the disk is full.

    Returns:
        The sha256 of the bytes.

    Raises:
        ResourceError: If the disk is full, or writing fails.
    """
    digest = hashlib.sha256()
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file, ThreadPoolExecutor(1, "pocketlm-hash") as hasher:
            for chunk in chunks:  # neither hashing nor writing holds the interpreter
                hashed = hasher.submit(digest.update, chunk)
                file.write(chunk)
                hashed.result()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path.parent, bytes_needed) from error
        raise ResourceError(f"writing failed ({error.strerror}).", where=str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def sync_directory(directory: Path) -> None:
    """Makes renames inside a directory durable, where the platform can (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_room(directory: Path, bytes_needed: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        ResourceError: If too little is free.
    """
    if shutil.disk_usage(directory).free < bytes_needed:
        raise _disk_full(directory, bytes_needed)


def _disk_full(directory: Path, bytes_needed: int) -> ResourceError:
    free = shutil.disk_usage(directory).free
    return ResourceError(
        f"the disk is full: {bytes_needed:,} bytes are needed, {free:,} are free.",
        where=str(directory),
        remedy="Free that much, or choose another place with -o; the same command then resumes.",
    )
