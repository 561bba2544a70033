"""Wanda's score for whole columns, as FLAP's authors use it for a baseline.

    score_j = mean_i |W_ij| · |X_j|₂       (arXiv:2312.11983; arXiv:2306.11695)

summed over the columns of a unit.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pocketlm.core.stats import Stat
from pocketlm.core.transform import Structure
from pocketlm.core.views import LinearView
from pocketlm.prune.moments import Moments
from pocketlm.prune.width import InputWidth, per_unit


class WandaSp(InputWidth):
    """Wanda for whole heads and channels: weights times the size of their inputs."""

    needs: ClassVar[tuple[type[Stat], ...]] = (Moments,)

    def statistic(self, width: int, columns: int, device: torch.device) -> Stat:
        """Sums of squares."""
        return Moments(columns, device)

    def scores(self, structure: Structure, reader: LinearView, stat: Moments) -> Tensor:
        """Mean |weight| times the norm of the inputs."""
        column_I = reader.weight_OI().abs().mean(0).double() * stat.norm_I()
        return per_unit(column_I, structure, reader)
