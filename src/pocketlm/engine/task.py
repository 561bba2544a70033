"""What a block step works on: the linears of a loaded block, its inputs and its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketlm.calibration.store import ActivationStore
from pocketlm.core.state import LinearState
from pocketlm.core.views import BlockView


class BlockData(Protocol):
    """Calibration data at one block."""

    @property
    def calls(self) -> Sequence[Any]:
        """What each batch calls the block with."""
        ...

    @property
    def store(self) -> ActivationStore:
        """The batches' inputs."""
        ...

    @property
    def original(self) -> ActivationStore | None:
        """Whose outputs are the targets."""
        ...

    @property
    def activation_bytes(self) -> int:
        """Memory that inputs and targets may stay in."""
        ...


class Task:
    """A BlockTask (see core/state.py).

    Args:
        block: The loaded block.
        states: Its linears that have a grid.
        data: The calibration data of both streams.
        device: Where the block computes.
        seed: Of the run.
        report: Told how far the step has come.
    """

    def __init__(
        self,
        block: BlockView,
        states: Mapping[str, LinearState],
        data: BlockData,
        device: torch.device,
        seed: int,
        report: Callable[[int, int, float], None],
    ) -> None:
        self.states, self.batches, self.device = states, len(data.calls), device
        self._block, self._data, self._seed, self.report = block, data, seed, report
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._spare_bytes = data.activation_bytes

    def inputs(self, batch: int) -> Tensor:
        """The block's input [B, T, D] as the compressed model so far gives it."""
        return self._at_hand("inputs", batch, self._data.store.get)

    def targets(self, batch: int) -> Tensor:
        """What the original block gives for the original model's input [B, T, D]."""
        assert self._data.original is not None
        return self._at_hand("targets", batch, self._data.original.output)

    def _at_hand(self, what: str, batch: int, read: Callable[[int], Tensor]) -> Tensor:
        """A batch on the device; it stays there as long as there is memory for activations.

        A step comes back to each batch many times.
        """
        kept = self._kept.get((what, batch))
        if kept is not None:
            return kept
        value = read(batch).to(self.device)
        if value.nbytes <= self._spare_bytes:
            self._kept[what, batch] = value
            self._spare_bytes -= value.nbytes
        return value

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """The block's output [B, T, D] for `inputs(batch)`, differentiable in the weights."""
        return self._block.forward_with(weights, self.inputs(batch), self._data.calls[batch])

    def generator(self) -> torch.Generator:
        """Randomness of this block: the same after a resume."""
        return torch.Generator().manual_seed(self._seed * 100_003 + self._block.index)
