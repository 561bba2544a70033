"""Calibration batches on their way through one block, stopped before each group of linears.

A group's statistics are complete when all batches stand before it; it is then compressed, and the
batches go on through the weights as decoded from what will be written. Calibration is thereby
true-sequential (GPTQ, arXiv:2210.17323, section 4) at the price of one forward pass. Runs hold
activations: those that the memory budget does not admit are dropped at each stop and run again from
the block's input, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.calibration.store import ActivationStore
from pocketlm.core.views import BlockRun, BlockView, Pause


class Runs:
    """The runs of all batches of one stream.

    Args:
        block: The loaded block.
        calls: What each batch calls the block with.
        store: The batches' inputs, and where outputs go.
        held: How many batches may stand inside the block at once.
        device: Where the block computes.
    """

    def __init__(
        self,
        block: BlockView,
        calls: Sequence[Any],
        store: ActivationStore,
        held: int,
        device: torch.device,
    ) -> None:
        self._block, self._calls, self._store, self._device = block, calls, store, device
        self._runs: dict[int, tuple[BlockRun, Pause | None]] = {}
        self._most = held

    def at(self, batch: int, group: int) -> Tensor | None:
        """A batch's input of a group [..., I]; None where the batch skips the group."""
        run, pause = self._advanced(batch, group)
        if batch < self._most:
            self._runs[batch] = (run, pause)
        return pause.inputs if pause is not None and pause.group == group else None

    def _advanced(self, batch: int, group: int) -> tuple[BlockRun, Pause | None]:
        run, pause = self._runs.pop(batch, (None, None))
        if run is None:
            run = self._block.start(self._store.get(batch).to(self._device), self._calls[batch])
            pause = run.advance()
        while pause is not None and pause.group < group:
            pause = run.advance()
        return run, pause

    def finish(self) -> None:
        """Runs every batch to the block's end and stores its output."""
        for batch in range(len(self._calls)):
            run, pause = self._advanced(batch, len(self._block.groups))
            while pause is not None:
                pause = run.advance()
            self._store.put(batch, run.output)


class Batches:
    """The calibration data at one block: the compressed model's stream, and perhaps the original's.

    Args:
        block: The loaded block, as the checkpoint has it.
        calls: What each batch calls the block with.
        store: Inputs of the block as the compressed model gives them; takes the outputs.
        original: The same of the original model; None where no step asks for it.
        held: How many batches may stand inside the block at once.
        device: Where the block computes.
    """

    def __init__(
        self,
        block: BlockView,
        calls: Sequence[Any],
        store: ActivationStore,
        original: ActivationStore | None,
        held: int,
        device: torch.device,
    ) -> None:
        self.count, self.calls = len(calls), calls
        self.store, self.original, self.device = store, original, device
        self._block, self._held = block, held
        if original is not None:
            for batch, call in enumerate(calls):
                original.put(batch, block.forward(original.get(batch).to(device), call))

    def sweep(self) -> Sweep:
        """All batches before the block's first group."""
        half = self._held if self.original is None else self._held // 2
        runs = Runs(self._block, self.calls, self.store, half, self.device)
        if self.original is None:
            return Sweep(runs, None, self.count, half)
        beside = Runs(self._block, self.calls, self.original, half, self.device)
        return Sweep(runs, beside, self.count, half)


class Sweep:
    """One pass of all batches through a block, from group to group.

    Args:
        runs: The compressed model's.
        original: The original model's, through original weights; or None.
        count: Batches.
        at_once: How many of the original's inputs are held while weights are exchanged.
    """

    def __init__(self, runs: Runs, original: Runs | None, count: int, at_once: int) -> None:
        self._runs, self._original = runs, original
        self._count, self._at_once = count, max(1, at_once)

    def inputs(self, group: int, take: Callable[[Tensor], None]) -> None:
        """Hands each batch's input of a group to `take`; batches that skip the group give none."""
        for batch in range(self._count):
            x_TI = self._runs.at(batch, group)
            if x_TI is not None:
                take(x_TI)

    def pairs(
        self,
        group: int,
        take: Callable[[Tensor, Tensor | None], None],
        exchange: Callable[[bool], None],
    ) -> None:
        """Hands the inputs of both streams to `take`, batch by batch.

        Args:
            group: Index of the group.
            take: Gets the compressed model's input and the original's, or None where the tokens
                may be others (an expert's, [tokens, I]).
            exchange: Puts original weights into the block (True) or compressed ones (False).
        """
        assert self._original is not None
        for start in range(0, self._count, self._at_once):
            some = range(start, min(start + self._at_once, self._count))
            exchange(True)
            originals = [self._original.at(batch, group) for batch in some]
            exchange(False)
            for batch, original_TI in zip(some, originals, strict=True):
                x_TI = self._runs.at(batch, group)
                if x_TI is not None:
                    take(x_TI, original_TI if x_TI.dim() > 2 else None)

    def finish(self) -> None:
        """Runs every batch to the block's end and stores its output."""
        self._runs.finish()
