"""Layer-by-layer knowledge distillation: trains the weights themselves, through their rounding.

    minimise over W   |L_k(X) - L̂_k(X; Q(W))|²

(ZeroQuant, Yao et al., arXiv:2206.01861, section 4.3): the original block is the teacher, gradients
pass rounding straight through, and one block is in memory at a time. W moves in gaps between its
levels, so that a rate means the same for every tile and number format; the grid stays where an
earlier step, or min-max, put it.

Deviation: the student's X is what the compressed model feeds the block, the teacher's what the
original had; the paper gives both the original's. So a block also mends what earlier ones lost.

Cost: core/reconstruct.py; 32 bytes a weight beside the block.

Legend: R tiles below and G beside each other, n weights of a tile (quant/grid.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from pocketlm.core.reconstruct import FORWARDS, Parameter, Schedule
from pocketlm.core.spec import Strict
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.stats import Stat
from pocketlm.quant.fake_quant import LearnedGrid, learn, passes_cost
from pocketlm.quant.grid import grouped


class Lkd(Strict):
    """Trains weights on a fixed grid against the block's output, by Adam.

    Attributes:
        iters: Iterations for each block.
        batch_size: Sequences of an iteration.
        rate: Adam's learning rate, in gaps between levels.
    """

    kind: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "grid", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    iters: int = Field(200, ge=1, le=100_000)
    batch_size: int = Field(8, ge=1)
    rate: float = Field(5e-3, gt=0, le=1)

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The linears, rounded to the nearest code from where training has moved them."""
        return learn(task, self._learner, Schedule("adam", self.iters, self.batch_size))

    def _learner(self, state: LinearState) -> LearnedGrid:
        moved_RGn = torch.zeros_like(grouped(state.reference_OI, state.spec))
        return LearnedGrid(state, offsets=Parameter(moved_RGn, self.rate))

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """Forward and backward passes of all iterations, and two checks on all data."""
        tokens = FORWARDS * self.iters * min(self.batch_size, samples) + 2 * samples
        return 2.0 * tokens * seq_len

    def cost(self, rows: int, columns: int) -> Cost:
        """The weight, what it has moved, its gradient, Adam's two moments and the start."""
        return passes_cost(rows, columns, self.iters, 32)
