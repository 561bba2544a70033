"""What a block step works on: the linears of a loaded block, its inputs and its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.state import LinearState
from pocketlm.core.views import BlockView
from pocketlm.engine.batches import Batches


class Task:
    """A BlockTask (see core/state.py).

    Args:
        block: The loaded block.
        states: Its linears that have a grid.
        batches: The calibration data of both streams.
        device: Where the block computes.
        seed: Of the run.
        report: Told how far the step has come.
    """

    def __init__(
        self,
        block: BlockView,
        states: Mapping[str, LinearState],
        batches: Batches,
        device: torch.device,
        seed: int,
        report: Callable[[int, int, float], None],
    ) -> None:
        self.states, self.batches, self.device = states, batches.count, device
        self._block, self._data, self._seed, self.report = block, batches, seed, report

    def inputs(self, batch: int) -> Tensor:
        """The block's input [B, T, D] as the compressed model so far gives it."""
        return self._data.store.get(batch).to(self.device)

    def targets(self, batch: int) -> Tensor:
        """What the original block gives for the original model's input [B, T, D]."""
        assert self._data.original is not None
        return self._data.original.output(batch).to(self.device)

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """The block's output [B, T, D] for `inputs(batch)`, differentiable in the weights."""
        return self._block.forward_with(weights, self.inputs(batch), self._data.calls[batch])

    def generator(self) -> torch.Generator:
        """Randomness of this block: the same after a resume."""
        return torch.Generator().manual_seed(self._seed * 100_003 + self._block.index)
