"""Learned weight clipping (OmniQuant): how far each group's grid reaches, by gradient descent.

    s = (σ(γ) max(W) - σ(β) min(W)) / (2^bits - 1),   z = -round(σ(β) min(W) / s)
    minimise |f(X; Q(W)) - Y|²  over  γ, β

(Shao et al., arXiv:2308.13137, eq. 2; σ the sigmoid.) Symmetric grids learn one γ for the scale.
What comes out is a grid: rtn, gptq or autoround after it start from its scales and zero points.

Deviation: where an earlier step chose the grid, γ and β start there; else at σ = 0.982 as in the
authors' code. Deviation: rates fall linearly to zero. The paper's learned equivalent transformation
is not here: a fold is decided before a block is compressed (see awq, smoothquant).

Cost: core/reconstruct.py with `epochs` · samples / `batch_size` iterations; 16 bytes a weight.

Legend: R tiles below and G beside each other, n weights of a tile (quant/grid.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.levels import level_ends
from pocketlm.core.reconstruct import FORWARDS, Parameter, Schedule
from pocketlm.core.spec import Strict
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.stats import Stat
from pocketlm.quant.fake_quant import LearnedGrid, ends_of, learn, passes_cost
from pocketlm.quant.grid import Grid, grid_of, grouped

SAMPLES = 128  # taken for `cost`, which is not told how many there are
START = 4.0  # γ and β where nothing is clipped yet
LEAST = 1e-4  # of σ, for groups that an earlier step has shrunk to nothing


class LearnedClip(Strict):
    """Learns the clipping of every group by Adam; a grid for rtn, gptq or autoround.

    Attributes:
        epochs: How often all samples are seen; the paper takes 20, and 40 for 2 bits.
        batch_size: Sequences of an iteration.
        rate: Adam's learning rate, as in the authors' code; the paper says 5e-3.
    """

    kind: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    epochs: int = Field(20, ge=1, le=1000)
    batch_size: int = Field(4, ge=1)
    rate: float = Field(1e-2, gt=0, le=1)

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The linears, rounded to the nearest level of the learned grid.

        Raises:
            UnsupportedLayer: If scales are quantized themselves (NF4 with double quantization).
        """
        samples = sum(task.inputs(batch).shape[0] for batch in range(task.batches))
        schedule = Schedule("adam", self._iterations(samples), self.batch_size)
        return learn(task, self._learner, schedule)

    def _iterations(self, samples: int) -> int:
        return self.epochs * -(-samples // self.batch_size)

    def _learner(self, state: LinearState) -> LearnedGrid:
        if state.spec.scale == "dynamic8":
            raise UnsupportedLayer(
                "its scales are quantized together: none can be learned for itself.",
                where=state.name,
                remedy="Leave learned_clip out, or choose a format without double quantization.",
            )
        grid = grid_of(state)
        ends = unclipped_ends(grid, state)
        multipliers = []
        for reach_RG, start_RG in zip(ends, ends_of(grid, state.spec), strict=True):
            share_RG = (start_RG / reach_RG).nan_to_num(1.0)
            logit_RG = torch.logit(share_RG.clamp(LEAST, 1.0)).clamp_(max=START)
            multipliers.append(Parameter(logit_RG, self.rate))
        return LearnedGrid(state, ends, multipliers, shape=torch.sigmoid)

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """Forward and backward passes of all epochs, and two checks on all data."""
        return 2.0 * (FORWARDS * self.epochs + 2) * samples * seq_len

    def cost(self, rows: int, columns: int) -> Cost:
        """The weight, its rounded form and its gradient."""
        return passes_cost(rows, columns, self._iterations(SAMPLES), 16)


def unclipped_ends(grid: Grid, state: LinearState) -> tuple[Tensor, ...]:
    """The ends [R, G], as of `ends_of`, of the least grid of the same sign that clips no weight."""
    weight_RGn = grouped(state.reference_OI, state.spec)
    high_RG, low_RG = weight_RGn.amax(-1), weight_RGn.amin(-1)
    if grid.zero_OG is not None:
        return high_RG.clamp(min=0), low_RG.clamp(max=0)
    lowest, highest = level_ends(state.spec)
    negative_RG = grid.scale_OG < 0
    upward_RG = torch.where(negative_RG, -low_RG, high_RG)
    downward_RG = torch.where(negative_RG, high_RG, -low_RG)
    reach_RG = torch.maximum(upward_RG / highest, downward_RG / -lowest)
    return (torch.where(negative_RG, -reach_RG, reach_RG),)
