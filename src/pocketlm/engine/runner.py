"""Runs a recipe: block after block from the source to the work directory, then the artifact.

    load block → gather statistics → compress → run on what was written → keep → free

It knows no method by name. A killed run redoes at most one block; on a GPU two, where a block is
written while the next one is in work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.calibration.store import ActivationStore, DiskStore, MemoryStore
from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import NumericError
from pocketlm.core.factored import LowRank, Sum
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import WeightSpec
from pocketlm.core.tensors import Dense, PackedFloat, PackedInt, Sparse, WeightTensor
from pocketlm.core.views import BlockView, ModelView
from pocketlm.engine.artifact import write_artifact
from pocketlm.engine.batches import Batches
from pocketlm.engine.block import Compressed, compress_block
from pocketlm.engine.ends import compress_end, end_tasks
from pocketlm.engine.events import EventLog
from pocketlm.engine.gradients import keep_gradients, read_gradients
from pocketlm.engine.grids import Grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Action, Entry, Ledger
from pocketlm.engine.machine import activation_device
from pocketlm.engine.memory import held_runs, runs_budget
from pocketlm.engine.options import Job
from pocketlm.engine.plan import Plan, boundary_bytes
from pocketlm.engine.progress import Progress
from pocketlm.engine.writing import BlockWriter
from pocketlm.formats import format_for
from pocketlm.formats.inputs import decode as decode_inputs


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
        plan: What was predicted.
    """

    def __init__(
        self,
        model: ModelView,
        job: Job,
        grids: Grids,
        windows: Windows | None,
        journal: Journal,
        log: EventLog,
        plan: Plan,
    ) -> None:
        self._model, self._job, self._grids = model, job, grids
        self._windows, self._journal, self._log = windows, journal, log
        self._plan, self._progress = plan, Progress(log, plan.stages)
        self._format = format_for(grids.format_name)
        self._calls: list[Any] = []
        self._store: ActivationStore | None = None
        self._original: ActivationStore | None = None

    def run(self) -> Outcome:
        """Does what is left of the job and puts the artifact in its place."""
        total = len(self._model.block_paths)
        first = self._journal.finished_blocks(total)
        if first:
            text = f"going on after block {first} of {total}; finished blocks are kept."
            self._log.emit("resumed", text, done=first, total=total)
        started = time.monotonic()
        if self._job.needs_gradients and first < total:
            self._keep_gradients()
        if self._windows is not None and first < total:
            self._prepare_activations(first)
        calibrated = time.monotonic()
        left = (total - first) / total
        self._progress.stage(
            "compress", f"compressing {total - first} blocks", left * self._plan.stages["compress"]
        )
        with BlockWriter(self._journal, self._model.device) as writer:
            for index in range(first, total):
                self._compress(index, first, total, writer)
        self._compress_ends()
        compressed = time.monotonic()
        self._progress.stage("assemble", "assembling the artifact")
        ledger = write_artifact(
            self._model, self._job, self._grids, self._windows, self._journal, self._wrote
        )
        seconds = {
            "calibrate": calibrated - started,
            "compress": compressed - calibrated,
            "assemble": time.monotonic() - compressed,
        }
        return Outcome(ledger, seconds, total - first, first)

    # --- activations ---

    def _prepare_activations(self, first: int) -> None:
        """Fills the stores with every batch at the boundary before block `first`."""
        assert self._windows is not None
        batches = self._batches(self._windows.tokens_NT)
        again = first / len(self._model.block_paths) * self._plan.resume_seconds
        planned = self._plan.stages["calibrate"] + again
        self._progress.stage("calibrate", "embedding the calibration text", planned)
        empty: list[ActivationStore] = []
        self._store, recovered = self._open_store("activations", first, len(batches))
        if not recovered:
            empty.append(self._store)
        if self._job.needs_original:
            self._original, recovered = self._open_store("originals", first, len(batches))
            if not recovered:
                empty.append(self._original)
        for batch, tokens_BT in enumerate(batches):
            hidden_BTD, call = self._model.begin(tokens_BT)
            self._calls.append(call)
            for store in empty:
                store.put(batch, hidden_BTD)
            done, total = batch + 1, len(batches)
            share = done / total / (1 + first)
            self._progress.step(share, "embedding the calibration text", done=done, total=total)
        for store in empty:
            store.advance(0)
            for index in range(first):
                self._replay(index, first, store)

    def _open_store(self, name: str, first: int, batches: int) -> tuple[ActivationStore, bool]:
        """A store of one stream, and whether it holds the boundary before block `first` already."""
        assert self._windows is not None
        needed = boundary_bytes(self._model, self._job, self._windows.tokens_NT.numel())
        if needed <= self._job.activation_bytes:
            place = activation_device(self._model.device, needed)
            return MemoryStore(keep_inputs=name == "originals", device=place), False
        disk = DiskStore(self._journal.directory / name)
        return disk, first > 0 and disk.recover(first, batches)

    def _batches(self, tokens_NT: Tensor) -> list[Tensor]:
        sequences = max(1, self._job.tokens_at_once // tokens_NT.shape[1])
        return list(tokens_NT.split(sequences))

    def _replay(self, index: int, first: int, store: ActivationStore) -> None:
        """Runs the batches through a block that an earlier attempt has finished."""
        with self._model.block(index) as block:
            if store is not self._original:
                self._take_over(index, block)
            for batch, call in enumerate(self._calls):
                hidden_BTD = store.get(batch).to(self._model.device)
                store.put(batch, block.forward(hidden_BTD, call))
        store.advance(index + 1)
        done = index + 1
        text = "recomputing activations through finished blocks"
        self._progress.step((1 + done) / (1 + first), text, block=index, done=done, total=first)

    def _take_over(self, index: int, block: BlockView) -> None:
        """Gives a block the weights and the rounding of inputs that were written of it."""
        tensors, entries = self._journal.read_block(index)
        for name, entry in entries.items():
            if entry.action == "folded":
                block.set_tensor(name, tensors[name])
        for name, view in block.linears.items():
            if name in self._grids.specs:
                weight = self._format.decode(tensors, name, entries[view.tensor_name].spec)
                view.set_weight_OI(weight.dequantize().to(self._model.device))
                quantizer = decode_inputs(tensors, name, self._grids.inputs.get(name))
                view.set_input_quantizer(quantizer)

    def _keep_gradients(self) -> None:
        assert self._windows is not None
        self._progress.stage("calibrate", "gradients of the original")
        keep_gradients(
            self._model, self._windows.tokens_NT, self._gradient_path, self._progress.step
        )

    @property
    def _gradient_path(self) -> Path:
        return self._journal.directory / "gradients"

    def _gradients(self, index: int) -> dict[str, Tensor] | None:
        return read_gradients(self._gradient_path, index) if self._job.needs_gradients else None

    # --- blocks ---

    def _compress(self, index: int, first: int, total: int, writer: BlockWriter) -> None:
        before = time.monotonic()
        path = self._model.block_paths[index]
        text = f"compressing block {index + 1} of {total}"
        self._log.emit("block_started", text, where=path, block=index)
        with self._model.block(index) as block:
            self._model.prefetch(index + 1)
            compressed = compress_block(
                block,
                self._job.steps,
                self._grids.specs,
                self._block_batches(block),
                self._model.device,
                activations=self._grids.inputs,
                kept_dtype=self._job.dtype,
                scale_dtype=self._job.scale_dtype,
                seed=self._job.seed,
                gradients=self._gradients(index),
                report=self._inside(index, first, total),
            )
            tensors: dict[str, Tensor] = dict(compressed.folded)
            entries = {name: self._folded(name, value) for name, value in tensors.items()}
            for result in compressed.linears:
                weight = self._stored(result)
                encoded = self._format.encode(result.view.tensor_name, weight, result.quantizer)
                tensors.update(encoded)
                entries[result.view.tensor_name] = self._account(result, weight, list(encoded))
        writer.write(index, tensors, entries)
        for store in (self._store, self._original):
            if store is not None:
                store.advance(index + 1)
        errors = [entry.error for entry in entries.values() if entry.error is not None]
        self._progress.step(
            (index + 1 - first) / (total - first),
            f"block {index + 1} of {total}",
            kind="block_done",
            where=path,
            block=index,
            done=index + 1,
            total=total,
            seconds=time.monotonic() - before,
            data={"mean_error": sum(errors) / max(len(errors), 1)},
        )

    def _compress_ends(self) -> None:
        """Compresses embedding and head, after the blocks: these read them as they were."""
        model, blocks = self._model, len(self._model.block_paths)
        for task in end_tasks(model.ends(), self._grids.ends, blocks):
            text = f"compressing {task.name}"
            self._progress.step(1.0, text, where=task.name)
            note = self._grids.notes.get(task.name)
            compress_end(
                task,
                partial(model.source.rows, task.end.tensor),
                self._job.scale_dtype or model.source.infos()[task.end.tensor].dtype,
                self._grids.format_name,
                self._job.end_steps,
                self._journal,
                model.device,
                [] if note is None else [note],
            )

    def _block_batches(self, block: BlockView) -> Batches | None:
        if self._store is None:
            return None
        budget = self._job.activation_bytes
        inside = runs_budget(self._model, budget)
        held = held_runs(self._model, block, self._calls_tokens(), inside)
        stores = (self._store, self._original)
        return Batches(block, self._calls, *stores, held, self._model.device, budget)

    def _calls_tokens(self) -> int:
        assert self._windows is not None
        return max(batch.numel() for batch in self._batches(self._windows.tokens_NT))

    def _inside(self, index: int, first: int, total: int) -> Callable[[float, float | None], None]:
        """Tells how far a block has come, and a few times the loss of a step that has one."""
        tenths = 0

        def report(share: float, loss: float | None) -> None:
            nonlocal tenths
            text = f"compressing block {index + 1} of {total}"
            done = (index - first + share) / (total - first)
            self._progress.step(done, text, block=index)
            if loss is not None and int(10 * share) > tenths:
                tenths = int(10 * share)
                data = {"stage": "compress", "loss": loss, "share": share}
                self._log.emit("loss", f"{text}: loss {loss:.3g}", block=index, data=data)

        return report

    def _folded(self, name: str, value: Tensor) -> Entry:
        return Entry(
            action="folded",
            reason="divided by scales that its readers were multiplied with",
            shape=self._model.source.infos()[name].shape,
            bits=value.numel() * value.element_size() * 8,
            outputs=[name],
        )

    def _stored(self, result: Compressed) -> WeightTensor:
        """A weight in the form in which it is written."""
        weight, sparsity = result.weight, self._grids.sparsity
        if result.mask_OI is None or sparsity is None or not self._grids.compact:
            return weight
        if isinstance(weight, Sum):
            assert not isinstance(weight.base, Sparse)
            return Sum(Sparse(weight.base, result.mask_OI, sparsity.pattern), weight.low)
        assert isinstance(weight, Dense | PackedInt | PackedFloat)
        plain = replace(weight, transposed=False) if isinstance(weight, Dense) else weight
        return Sparse(plain, result.mask_OI, sparsity.pattern)

    def _account(self, result: Compressed, weight: WeightTensor, outputs: list[str]) -> Entry:
        name = result.view.name
        if not torch.isfinite(torch.tensor(result.error)):
            raise NumericError(
                "its output error is not finite.", where=name, remedy="Add it to --ignore."
            )
        notes = list(self._notes(result))
        rounding = self._grids.inputs.get(name)
        scale_bits = 0 if rounding is None else rounding.stored_bits
        mask_OI = result.mask_OI
        action, rank = _action(weight, result)
        reason = " → ".join(step.method for step in self._job.recipe.steps)
        return Entry(
            action=action,
            reason=f"{reason} leaves it as it is" if action == "kept" else reason,
            shape=self._model.source.infos()[result.view.tensor_name].shape,
            bits=weight.stored_bits + scale_bits,
            spec=_as_planned(weight.spec, self._grids.specs.get(name)),
            sparsity=None if mask_OI is None else 1 - int(mask_OI.sum()) / mask_OI.numel(),
            rank=rank,
            activations=rounding,
            error=round(result.error, 9),
            inputs=result.inputs,
            notes=notes,
            outputs=outputs,
        )

    def _notes(self, result: Compressed) -> Iterator[str]:
        name = result.view.name
        if name in self._grids.notes:
            yield self._grids.notes[name]
        for note in result.notes:
            self._log.emit("fallback", note.text, where=name, data={"kind": note.kind})
            yield note.text

    def _wrote(self, done: int, total: int) -> None:
        self._progress.step(done / total if total else 1.0, "assembling the artifact")


def _as_planned(spec: WeightSpec, planned: QuantSpec | None) -> WeightSpec:
    """The format with the group size that was planned, where codes tell only of a whole row.

    An engine decodes the experts of a layer by one scheme, and not all have as many columns.
    """
    if planned is None or spec != planned.model_copy(update={"group_size": None}):
        return spec
    return planned


def _action(weight: WeightTensor, result: Compressed) -> tuple[Action, int | None]:
    """What was done to a linear, and the rank of its factors if it has some."""
    if isinstance(weight, LowRank):
        return "factorised", weight.rank
    if isinstance(weight, Sum):
        return "factorised", weight.low.rank
    if result.spec is not None:
        return "quantized", None
    return ("pruned" if result.mask_OI is not None else "kept"), None
