"""AutoRound (SignRound): learns by how much each weight's rounding is off, and the grid's ends.

    s = (max(W) α - min(W) β) / (2^bits - 1),   Ŵ = s · (clamp(round(W / s + V + z)) - z)
    minimise |f(X; Ŵ) - Y|²  over  V in [-½, ½], α and β,  by steps along the gradient's sign

(Cheng et al., arXiv:2309.05516, eq. 3-6.) With a rate of 1 / iterations that falls linearly to zero
no offset moves by more than ½: a weight is rounded up or down, never further. Symmetric grids learn
one multiplier of the scale instead of α and β.

Deviation: where an earlier step chose the grid, learning starts there and not at min-max; α and β
may then also exceed 1. Deviation: the parameters of the last step are kept, if they are better on
all data than the start; the authors' code keeps those of the best batch.

Cost: core/reconstruct.py; 28 bytes a weight beside the block.

Number formats beside integers learn offsets in gaps between their levels, and the scale as far as
it can be stored; scales that are quantized together (NF4 with double quantization) stay.

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
from pocketlm.quant.fake_quant import LearnedGrid, ends_of, learn, passes_cost
from pocketlm.quant.grid import grid_of, grouped

LOW, HIGH = 0.5, 1.5  # of α and β
ITERATIONS = {"light": 50, "default": 200, "best": 1000}


class Autoround(Strict):
    """Learns rounding and the grid of all linears of a block by signed gradients.

    Attributes:
        preset: Iterations by name: "light" 50, "default" 200, "best" 1000.
        iters: Iterations; None: the preset's.
        batch_size: Sequences of an iteration.
        rate: How far an offset may move in all, in codes; 1: half a code each way.
        grid_rate: The same for the multipliers of the grid; 0 leaves the grid alone.
    """

    kind: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    preset: Literal["light", "default", "best"] = "default"
    iters: int | None = Field(None, ge=1, le=100_000)
    batch_size: int = Field(8, ge=1)
    rate: float = Field(1.0, gt=0, le=10)
    grid_rate: float = Field(1.0, ge=0, le=10)

    @property
    def iterations(self) -> int:
        """Steps for each block."""
        return self.iters or ITERATIONS[self.preset]

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The linears with learned codes, scales and zero points."""
        return learn(task, self._learner, Schedule("sign", self.iterations, self.batch_size))

    def _learner(self, state: LinearState) -> LearnedGrid:
        each = 1.0 / self.iterations
        multipliers = []
        if self.grid_rate and state.spec.scale != "dynamic8":  # those scales hang together
            multipliers = [
                Parameter(torch.ones_like(end), self.grid_rate * each, low=LOW, high=HIGH)
                for end in ends_of(grid_of(state), state.spec)
            ]
        offsets_RGn = torch.zeros_like(grouped(state.reference_OI, state.spec))
        offsets = Parameter(offsets_RGn, self.rate * each)
        return LearnedGrid(state, multipliers=multipliers, offsets=offsets)

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """Forward and backward passes of all iterations, and two checks on all data."""
        tokens = FORWARDS * self.iterations * min(self.batch_size, samples) + 2 * samples
        return 2.0 * tokens * seq_len

    def cost(self, rows: int, columns: int) -> Cost:
        """The weight, its offsets, their gradients and start; some passes an iteration."""
        return passes_cost(rows, columns, self.iterations, 28)
