"""Boundary activations: what flows from one block to the next, in memory or on disk.

Legend: B sequences, T tokens, D hidden width.

In memory, the machine's or a GPU's, a batch is overwritten as soon as the block's output is there.
On disk there are two directories, taken in turn, and the block's index is written last, with a
checksum of every file: a kill at any instant leaves one whole boundary to go on from.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor


class ActivationStore(Protocol):
    """Hidden states of every batch at the boundary before the block in work."""

    def get(self, batch: int) -> Tensor:
        """A batch's input [B, T, D] of the block in work."""
        ...

    def put(self, batch: int, hidden_BTD: Tensor) -> None:
        """A batch's output of the block in work."""
        ...

    def output(self, batch: int) -> Tensor:
        """What was put of a batch; a store that overwrites inputs gives it for `get` as well."""
        ...

    def advance(self, boundary: int) -> None:
        """All outputs are there: they become the inputs of block `boundary`."""
        ...


class MemoryStore:
    """Activations in memory.

    Args:
        keep_inputs: Whether inputs stay beside outputs until `advance`; else a batch's output
            takes its input's place.
        device: Whose memory: on a GPU that has room for them, nothing crosses the bus.
    """

    def __init__(self, keep_inputs: bool = False, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._inputs: dict[int, Tensor] = {}
        self._outputs = {} if keep_inputs else self._inputs

    def get(self, batch: int) -> Tensor:
        """A batch's input [B, T, D]."""
        return self._inputs[batch]

    def put(self, batch: int, hidden_BTD: Tensor) -> None:
        """Keeps the batch's output."""
        self._outputs[batch] = hidden_BTD.detach().to(self._device)

    def output(self, batch: int) -> Tensor:
        """What was put."""
        return self._outputs[batch]

    def advance(self, boundary: int) -> None:
        """Outputs become inputs."""
        if self._outputs is not self._inputs:
            self._inputs, self._outputs = self._outputs, {}


class DiskStore:
    """Activations in a checksummed double buffer on disk.

    Args:
        directory: Where the two buffers lie; made if absent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._side = 0
        self._sums: dict[int, str] = {}
        for side in (0, 1):
            self._buffer(side).mkdir(parents=True, exist_ok=True)

    def _buffer(self, side: int) -> Path:
        return self._directory / f"buffer{side}"

    def recover(self, boundary: int, batches: int) -> bool:
        """Looks for a whole buffer before block `boundary`, left by a run that was stopped.

        Returns:
            True if one was found: its batches are now what `get` gives.
        """
        for side in (0, 1):
            mark = self._buffer(side) / "boundary.json"
            if not mark.exists():
                continue
            record = json.loads(mark.read_text(encoding="utf-8"))
            if record["boundary"] != boundary or len(record["sha256"]) != batches:
                continue
            paths = [self._path(side, batch) for batch in range(batches)]
            sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists()]
            if sums == record["sha256"]:
                self._side = side
                return True
        return False

    def _path(self, side: int, batch: int) -> Path:
        return self._buffer(side) / f"{batch:06d}.safetensors"

    def get(self, batch: int) -> Tensor:
        """A batch's input [B, T, D]."""
        return load(self._path(self._side, batch).read_bytes())["hidden"]

    def put(self, batch: int, hidden_BTD: Tensor) -> None:
        """Writes the batch into the other buffer."""
        other = 1 - self._side
        if not self._sums:
            (self._buffer(other) / "boundary.json").unlink(missing_ok=True)
        data = save({"hidden": hidden_BTD.detach().cpu().contiguous()})
        self._sums[batch] = hashlib.sha256(data).hexdigest()
        with self._path(other, batch).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def output(self, batch: int) -> Tensor:
        """What was put."""
        return load(self._path(1 - self._side, batch).read_bytes())["hidden"]

    def advance(self, boundary: int) -> None:
        """Marks the other buffer as whole and turns to it."""
        self._side = 1 - self._side
        sums = [self._sums[batch] for batch in sorted(self._sums)]
        mark = self._buffer(self._side) / "boundary.json"
        partial = mark.with_suffix(".partial")
        partial.write_text(json.dumps({"boundary": boundary, "sha256": sums}), encoding="utf-8")
        partial.replace(mark)
        self._sums = {}
