"""Runs a recipe: block after block from the source to the work directory, then the artifact.

    load block → gather statistics → compress → run on what was written → keep → free

It knows no method by name. A killed run redoes at most one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketlm.calibration.store import ActivationStore, DiskStore, MemoryStore
from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import NumericError
from pocketlm.core.views import BlockView, ModelView
from pocketlm.engine.artifact import write_artifact
from pocketlm.engine.block import Batches, Compressed, compress_block
from pocketlm.engine.events import EventLog
from pocketlm.engine.grids import Grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.engine.memory import held_runs, hidden_bytes
from pocketlm.engine.options import Job
from pocketlm.formats import format_for


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind besides the artifact.

    Attributes:
        ledger: Every tensor accounted for.
        seconds: Seconds of this attempt by stage.
        blocks_done: Blocks compressed in this attempt.
        blocks_resumed: Blocks taken over from earlier attempts.
    """

    ledger: Ledger
    seconds: dict[str, float]
    blocks_done: int
    blocks_resumed: int


class Runner:
    """One attempt at a job.

    Args:
        model: The source as a stream of blocks.
        job: What to do.
        grids: Which linear gets which grid.
        windows: Calibration tokens; None where no step needs any.
        journal: The record of what is done.
        log: Where events go.
    """

    def __init__(
        self,
        model: ModelView,
        job: Job,
        grids: Grids,
        windows: Windows | None,
        journal: Journal,
        log: EventLog,
    ) -> None:
        self._model, self._job, self._grids = model, job, grids
        self._windows, self._journal, self._log = windows, journal, log
        self._format = format_for(grids.format_name)
        self._calls: list[Any] = []
        self._store: ActivationStore | None = None

    def run(self) -> Outcome:
        """Does what is left of the job and puts the artifact in its place."""
        total = len(self._model.block_paths)
        first = self._journal.finished_blocks(total)
        if first:
            text = f"going on after block {first} of {total}; finished blocks are kept."
            self._log.emit("resumed", text, done=first, total=total)
        started = time.monotonic()
        if self._windows is not None and first < total:
            self._prepare_activations(first)
        calibrated = time.monotonic()
        for index in range(first, total):
            self._compress(index, first, total, calibrated)
        compressed = time.monotonic()
        self._log.emit("stage", "assembling the artifact", data={"stage": "assemble"})
        ledger = write_artifact(self._model, self._job, self._grids, self._journal, self._log)
        seconds = {
            "calibrate": calibrated - started,
            "compress": compressed - calibrated,
            "assemble": time.monotonic() - compressed,
        }
        return Outcome(ledger, seconds, total - first, first)

    # --- activations ---

    def _prepare_activations(self, first: int) -> None:
        """Fills the store with every batch at the boundary before block `first`."""
        assert self._windows is not None
        batches = self._batches(self._windows.tokens_NT)
        on_disk = (
            hidden_bytes(self._model, self._windows.tokens_NT.numel()) > self._job.activation_bytes
        )
        disk = DiskStore(self._journal.directory / "activations") if on_disk else None
        store: ActivationStore = disk or MemoryStore()
        recovered = disk is not None and first > 0 and disk.recover(first, len(batches))
        self._log.emit("stage", "embedding the calibration text", data={"stage": "calibrate"})
        for index, tokens_BT in enumerate(batches):
            hidden_BTD, call = self._model.begin(tokens_BT)
            self._calls.append(call)
            if not recovered:
                store.put(index, hidden_BTD)
        if not recovered:
            store.advance(0)
            for index in range(first):
                self._replay(index, store)
        self._store = store

    def _batches(self, tokens_NT: Tensor) -> list[Tensor]:
        sequences = max(1, self._job.tokens_at_once // tokens_NT.shape[1])
        return list(tokens_NT.split(sequences))

    def _replay(self, index: int, store: ActivationStore) -> None:
        """Runs the batches through a block that an earlier attempt has finished."""
        text = f"recomputing activations through finished block {index}"
        self._log.emit("progress", text, block=index, data={"stage": "calibrate"})
        tensors, _ = self._journal.read_block(index)
        with self._model.block(index) as block:
            for name, view in block.linears.items():
                if name in self._grids.specs:
                    packed = self._format.decode(tensors, name, self._grids.specs[name])
                    view.set_weight_OI(packed.dequantize().to(self._model.device))
            for batch, call in enumerate(self._calls):
                hidden_BTD = store.get(batch).to(self._model.device)
                store.put(batch, block.forward(hidden_BTD, call))
        store.advance(index + 1)

    # --- blocks ---

    def _compress(self, index: int, first: int, total: int, started: float) -> None:
        before = time.monotonic()
        path = self._model.block_paths[index]
        self._log.emit("block_started", f"block {index + 1} of {total}", where=path, block=index)
        with self._model.block(index) as block:
            results = compress_block(
                block,
                self._job.steps,
                self._grids.specs,
                self._block_batches(block),
                self._model.device,
            )
            tensors: dict[str, Tensor] = {}
            entries: dict[str, Entry] = {}
            for result in results:
                encoded = self._format.encode(result.view.tensor_name, result.packed)
                tensors.update(encoded)
                entries[result.view.tensor_name] = self._account(result, list(encoded))
        self._journal.write_block(index, tensors, entries)
        if self._store is not None:
            self._store.advance(index + 1)
        seconds = time.monotonic() - before
        each = (time.monotonic() - started) / (index + 1 - first)
        errors = [entry.error or 0.0 for entry in entries.values()]
        self._log.emit(
            "block_done",
            f"block {index + 1} of {total}",
            where=path,
            block=index,
            done=index + 1,
            total=total,
            seconds=seconds,
            seconds_left=each * (total - index - 1),
            data={"stage": "compress", "mean_error": sum(errors) / max(len(errors), 1)},
        )

    def _block_batches(self, block: BlockView) -> Batches | None:
        if self._store is None:
            return None
        held = held_runs(self._model, block, self._calls_tokens(), self._job.activation_bytes)
        return Batches(block, self._calls, self._store, held, self._model.device)

    def _calls_tokens(self) -> int:
        assert self._windows is not None
        return max(batch.numel() for batch in self._batches(self._windows.tokens_NT))

    def _account(self, result: Compressed, outputs: list[str]) -> Entry:
        name = result.view.name
        if not torch.isfinite(torch.tensor(result.error)):
            raise NumericError(
                "its output error is not finite.", where=name, remedy="Add it to --ignore."
            )
        notes = list(self._notes(result))
        return Entry(
            action="quantized",
            reason=" → ".join(step.method for step in self._job.recipe.steps),
            shape=self._model.source.infos()[result.view.tensor_name].shape,
            bits=result.packed.stored_bits,
            spec=result.spec,
            error=round(result.error, 9),
            notes=notes,
            outputs=outputs,
        )

    def _notes(self, result: Compressed) -> Iterator[str]:
        name = result.view.name
        if name in self._grids.notes:
            yield self._grids.notes[name]
        for kind, text in result.notes:
            self._log.emit("fallback", text, where=name, data={"kind": kind})
            yield text
