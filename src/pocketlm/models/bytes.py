"""Raw bytes of tensors: reused aligned buffers, positional reads, a check that weights are finite.

Files are read by position, never mapped: mapped pages count as resident memory and stay.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.core.errors import SourceError

PIECE_BYTES = 8 << 20  # a multiple of every element size; small enough to stay in the last cache


class PositionalFile:
    """A file opened once and read at any offset, by any thread.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(
                path, os.O_RDONLY | (os.O_BINARY if sys.platform == "win32" else 0)
            )
        except OSError as error:
            raise SourceError(f"cannot be opened ({error.strerror}).", where=str(path)) from error
        self.close = weakref.finalize(self, os.close, self._handle)  # also when nobody calls it
        self.bytes_total = os.fstat(self._handle).st_size
        self._lock = threading.Lock()

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills `target` with the file's bytes from `offset` on.

        Raises:
            SourceError: If the file ends before that, or the disk fails.
        """
        done = 0
        while done < len(target):
            try:
                count = self._read_some(target[done:], offset + done)
            except OSError as error:
                what = f"reading failed at byte {offset + done} ({error.strerror})."
                raise SourceError(what, where=str(self.path)) from error
            if count == 0:
                raise SourceError(
                    f"ends at byte {offset + done}, inside a tensor.",
                    where=str(self.path),
                    remedy="The file is truncated: download or copy it again.",
                )
            done += count

    def _read_some(self, target: memoryview, offset: int) -> int:
        if sys.platform != "win32":
            return os.preadv(self._handle, [target], offset)
        with self._lock:  # Windows has no positional read
            os.lseek(self._handle, offset, os.SEEK_SET)
            piece = os.read(self._handle, min(len(target), PIECE_BYTES))
            target[: len(piece)] = piece
            return len(piece)


class BufferPool:
    """Byte buffers handed out again and again; torch aligns them to 64 bytes."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @contextmanager
    def borrow(self, bytes_wanted: int) -> Iterator[Tensor]:
        """A uint8 tensor of exactly `bytes_wanted`, given back on leaving."""
        buffer = self._free.pop() if self._free else torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < bytes_wanted:
            buffer = torch.empty(bytes_wanted, dtype=torch.uint8)
        try:
            yield buffer[:bytes_wanted]
        finally:
            self._free.append(buffer)


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable where the tensor is."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def require_finite(name: str, values: Tensor, where: str) -> None:
    """Refuses weights with NaN or infinity.

    Args:
        name: The tensor, for the message.
        values: Any piece of it.
        where: The file, for the message.

    Raises:
        SourceError: If a value is not finite.
    """
    if not values.is_floating_point() or values.element_size() == 1 or values.numel() == 0:
        return
    # One reduction tells: NaN and infinity survive min and max, and nothing else makes them.
    low, high = torch.aminmax(values)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(values)).sum())
        raise SourceError(
            f"tensor '{name}' holds {bad} values that are NaN or infinite.",
            where=where,
            remedy="The checkpoint is damaged: get it again, or repair the weights.",
        )
