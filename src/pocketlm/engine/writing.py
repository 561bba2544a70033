"""Finished blocks on their way to the work directory: from a GPU while the next one is computed.

A block's tensors are copied by a stream of their own and written by a thread; one block at a time
is under way. On the CPU, whose cores are at work, a block is written before the next begins.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Entry


class BlockWriter:
    """Keeps finished blocks; to be used as a context, which ends when all are written.

    Args:
        journal: Where they go.
        device: Where blocks compute.
    """

    def __init__(self, journal: Journal, device: torch.device) -> None:
        self._journal, self._device = journal, device
        self._thread = ThreadPoolExecutor(1, "pocketlm-writer") if device.type == "cuda" else None
        self._under_way: Future[None] | None = None

    def write(self, index: int, tensors: dict[str, Tensor], entries: dict[str, Entry]) -> None:
        """Takes over a finished block; what went wrong with the one before it comes up here.

        Args:
            index: Of the block.
            tensors: To be written, by name; nobody may change them any more.
            entries: Its part of the ledger.
        """
        if self._thread is None:
            self._journal.write_block(index, tensors, entries)
            return
        self.wait()
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._under_way = self._thread.submit(self._copy, ready, index, tensors, entries)

    def _copy(
        self,
        ready: torch.cuda.Event,
        index: int,
        tensors: dict[str, Tensor],
        entries: dict[str, Entry],
    ) -> None:
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            copied = {name: tensor.to("cpu") for name, tensor in tensors.items()}
        self._journal.write_block(index, copied, entries)

    def wait(self) -> None:
        """Returns when everything taken over is written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the thread; an error under way is not covered by one of writing."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if kind is None:
            self.wait()
