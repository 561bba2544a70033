"""What a transform finds out of the original model, in streamed passes over the calibration text.

Findings of a block are kept in the work directory as soon as the block is done: a run that was
stopped recomputes activations up to there, or reads them where they are on disk, and goes on.
Passes that need all blocks at once (gradients, removals) begin anew after a kill.

Legend: B sequences, T tokens, D hidden width, L blocks, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.calibration.store import ActivationStore, DiskStore, MemoryStore
from pocketlm.calibration.windows import Windows
from pocketlm.core.changes import Changes
from pocketlm.core.errors import CalibrationError
from pocketlm.core.transform import Altered, Findings, Outline, Visit
from pocketlm.core.views import BlockView
from pocketlm.engine import gradients
from pocketlm.engine.gradients import Report, first_windows, positions_at_once, walk_back
from pocketlm.engine.journal import Journal
from pocketlm.engine.memory import hidden_bytes
from pocketlm.models import Model
from pocketlm.models.opening import reopen

FEW_TOKENS = 4096  # for a pass with every block left out once
DISTANCE_TOKENS = 1024  # of a whole pass for every change that is tried


class BlockVisit:
    """A Visit (see core/transform.py).

    Args:
        block: The loaded block.
        calls: What each batch calls it with.
        store: The batches' inputs; takes the outputs.
        device: Where the block computes.
    """

    def __init__(
        self, block: BlockView, calls: list[Any], store: ActivationStore, device: torch.device
    ) -> None:
        self.block, self.index = block, block.index
        self._calls, self._store, self._device = calls, store, device
        self.done = 0

    def rehearse(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs every batch and keeps nothing; see core/transform.py."""
        for batch, call in enumerate(self._calls):
            before_BTD = self._store.get(batch).to(self._device)
            yield before_BTD, self.block.forward(before_BTD, call)

    def run(
        self,
        on_group: Callable[[int, Tensor], None] | None = None,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs every batch that has not been run yet; see core/transform.py."""
        for batch in range(self.done, len(self._calls)):
            before_BTD = self._store.get(batch).to(self._device)
            if enter is not None:
                before_BTD = enter(before_BTD)
            run = self.block.start(before_BTD, self._calls[batch])
            while (pause := run.advance()) is not None:
                if on_group is not None:
                    on_group(pause.group, pause.inputs)
            self._store.put(batch, run.output)
            self.done += 1
            yield before_BTD, run.output


class StreamedSurvey:
    """A Survey (see core/transform.py).

    Args:
        model: The original.
        outline: Its dimensions.
        windows: Calibration tokens; None where the transform needs none.
        journal: Keeps findings.
        tokens_at_once: Tokens of one batch.
        activation_bytes: Memory that boundary activations may take; beyond it they are on disk.
        report: Told the share that is done, and of what.
    """

    def __init__(
        self,
        model: Model,
        outline: Outline,
        windows: Windows | None,
        journal: Journal,
        tokens_at_once: int,
        activation_bytes: int,
        report: Report,
    ) -> None:
        self.outline = outline
        self._model, self._windows, self._journal = model, windows, journal
        self._tokens_at_once, self._activation_bytes = tokens_at_once, activation_bytes
        self._report = report

    @property
    def _tokens_NT(self) -> Tensor:
        if self._windows is None:
            raise CalibrationError(
                "the recipe needs calibration tokens, and none are given.", where="windows"
            )
        return self._windows.tokens_NT

    def _batches(self, tokens_NT: Tensor) -> list[Tensor]:
        return list(tokens_NT.split(max(1, self._tokens_at_once // tokens_NT.shape[1])))

    # --- one pass forward ---

    @torch.no_grad()
    def visit(
        self, look: Callable[[Visit], dict[str, Tensor]], alter: Altered | None = None
    ) -> Findings:
        """Runs the calibration text through the model, block after block."""
        total = len(self._model.block_paths)
        first = self._journal.finished_blocks(total)
        found = [self._journal.read_block(index)[0] for index in range(first)]
        if first == total:
            return found
        calls, store = self._begin(found, alter)
        for index in range(first, total):
            with self._model.block(index) as block:
                visit = BlockVisit(block, calls, store, self._model.device)
                seen = {
                    name: value.cpu().clone(memory_format=torch.contiguous_format)
                    for name, value in look(visit).items()
                }
                for _ in visit.run():  # what the look has left
                    pass
            self._journal.write_block(index, seen, {})
            store.advance(index + 1)
            found.append(seen)
            self._report((index + 1) / total, f"looked at block {index + 1} of {total}")
        return found

    def _begin(self, found: Findings, alter: Altered | None) -> tuple[list[Any], ActivationStore]:
        """What every batch calls blocks with, and the batches at the boundary after those found."""
        first = len(found)
        batches = self._batches(self._tokens_NT)
        store: ActivationStore = MemoryStore()
        recovered = False
        if hidden_bytes(self._model, self._tokens_NT.numel()) > self._activation_bytes:
            store = disk = DiskStore(self._journal.directory / "activations")
            recovered = first > 0 and disk.recover(first, len(batches))
        calls: list[Any] = []
        for batch, tokens_BT in enumerate(batches):
            hidden_BTD, call = self._model.begin(tokens_BT)
            calls.append(call)
            if not recovered:
                store.put(batch, hidden_BTD)
        if not recovered:
            store.advance(0)
            for index in range(first):
                with self._model.block(index) as block:
                    visit = BlockVisit(block, calls, store, self._model.device)
                    enter = None if alter is None else alter(block, found[index])
                    for _ in visit.run(enter=enter):
                        pass
                store.advance(index + 1)
        return calls, store

    # --- the model without one block ---

    @torch.no_grad()
    def removal_losses(self) -> Tensor:
        """Log-perplexity of the model without block i [L], on the first windows."""
        total = len(self._model.block_paths)
        sums_L, count = torch.zeros(total, dtype=torch.float64), 0
        batches = self._batches(first_windows(self._tokens_NT, FEW_TOKENS))
        for place, tokens_BT in enumerate(batches):
            tokens_BT = tokens_BT.to(self._model.device)
            hidden_BTD, call = self._model.begin(tokens_BT)
            without: list[Tensor] = []  # i: the stream that left out block i
            for index in range(total):
                with self._model.block(index) as block:
                    without = [block.forward(x.to(self._model.device), call).cpu() for x in without]
                    without.append(hidden_BTD.cpu())
                    hidden_BTD = block.forward(hidden_BTD, call)
                done = (place + ((index + 1) / total) ** 2) / len(batches)
                self._report(done, f"leaving out blocks up to {index + 1} of {total}")
            for index, state_BTD in enumerate(without):
                sums_L[index] += self._loss(state_BTD.to(self._model.device), tokens_BT)
            count += tokens_BT[:, 1:].numel()
        return sums_L / count

    def _loss(self, hidden_BTD: Tensor, tokens_BT: Tensor) -> float:
        """Summed cross-entropy of the next tokens, in nats."""
        end_ND = self._model.finish(hidden_BTD)[:, :-1].flatten(0, 1)
        next_N = tokens_BT[:, 1:].flatten()
        step = positions_at_once(self._model)
        return sum(
            float(F.cross_entropy(self._model.logits(x_PD), next_P, reduction="sum").double())
            for x_PD, next_P in zip(end_ND.split(step), next_N.split(step), strict=True)
        )

    # --- gradients ---

    def gradients(
        self, look: Callable[[int, BlockView, Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> Findings:
        """Gradients of the mean loss over the first windows; see engine/gradients.py."""
        batches = self._batches(first_windows(self._tokens_NT, gradients.TOKENS))
        return walk_back(self._model, batches, look, self._report)

    # --- a changed model ---

    @torch.no_grad()
    def distance(self, changes: Changes) -> float:
        """Mean cosine between the last hidden states of the original and of a changed model."""
        if not hasattr(self, "_ends"):
            self._ends = self._last(self._model)
        pairs = zip(self._last(reopen(self._model, changes)), self._ends, strict=True)
        cosines = [F.cosine_similarity(a, b, dim=-1).double().mean() for a, b in pairs]
        return float(sum(cosines) / len(cosines))

    def _last(self, model: Model) -> list[Tensor]:
        """The last hidden states of the first windows."""
        states, calls = [], []
        for tokens_BT in self._batches(first_windows(self._tokens_NT, DISTANCE_TOKENS)):
            hidden_BTD, call = model.begin(tokens_BT)
            states.append(hidden_BTD)
            calls.append(call)
        for index in range(len(model.block_paths)):
            with model.block(index) as block:
                states = [block.forward(x, c) for x, c in zip(states, calls, strict=True)]
        return [model.finish(x).float().cpu() for x in states]
