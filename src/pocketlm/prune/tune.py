"""Repair by learning: what a mask keeps is trained against the output of the original block.

Nothing but the kept weights moves, by Adam, in units of each row's own size. The block reads what
the compressed model so far gives it, so that losses of earlier blocks are mended too (block-wise
reconstruction as in `core.reconstruct`; for pruned models: EBFT, arXiv:2402.12419).

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.reconstruct import FORWARDS, Parameter, Schedule, reconstruct
from pocketlm.core.spec import Strict
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.stats import Stat
from pocketlm.core.tensors import Dense
from pocketlm.prune.steps import pruned


class KeptWeights:
    """A Learner: the weight where the mask keeps it, zero elsewhere."""

    def __init__(self, state: LinearState, rate: float) -> None:
        self._start_OI, self._state = state.reference_OI, state
        self._size_O1 = self._start_OI.square().mean(1, keepdim=True).sqrt()
        moved = Parameter(torch.zeros_like(self._start_OI), rate)
        self.parameters: Sequence[Parameter] = (moved,)

    def weight_OI(self) -> Tensor:
        """The weight [O, I], differentiable in the parameters."""
        moved_OI = self._start_OI + self._size_O1 * self.parameters[0].values
        return self._state.masked(moved_OI)


class Tune(Strict):
    """Trains what pruning has kept, block by block, against the original block's output.

    Attributes:
        iters: Steps for each block.
        batch_size: Sequences of a step.
        rate: Adam's learning rate, in units of a row's root mean square.
    """

    kind: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset()

    iters: int = Field(200, ge=1, le=100_000)
    batch_size: int = Field(8, ge=1)
    rate: float = Field(5e-3, gt=0, le=1)

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The linears with learned weights under the same masks."""
        learners = {name: KeptWeights(state, self.rate) for name, state in task.states.items()}
        schedule = Schedule("adam", self.iters, self.batch_size)
        outcome = reconstruct(task, learners, schedule)
        after: dict[str, LinearState] = {}
        for name, state in task.states.items():
            weight_OI = learners[name].weight_OI().detach()
            if state.mask_OI is None:
                after[name] = state.with_current(Dense(weight_OI), *outcome.notes(name))
            else:
                after[name] = pruned(state, weight_OI, state.mask_OI, *outcome.notes(name))
        return after

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """Forward and backward passes of all iterations, and two checks on all data."""
        tokens = FORWARDS * self.iters * min(self.batch_size, samples) + 2 * samples
        return 2.0 * tokens * seq_len

    def cost(self, rows: int, columns: int) -> Cost:
        """The weight, what it has moved, its gradient, Adam's moments and the start."""
        return Cost(32 * rows * columns, 100.0 * self.iters * rows * columns, 20 * self.iters)
