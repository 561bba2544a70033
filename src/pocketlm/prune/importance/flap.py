"""FLAP (arXiv:2312.11983): what hardly fluctuates can be replaced by its mean.

    score_j = Σ_t (x_tj - x̄_j)² / (T - 1) · |W_:j|²₂        (eq. 4)
    bias   += W_:removed x̄_removed                          (eq. 6)

summed over the columns of a unit. The bias is kept where the linear has one or the configuration
can say one; else the model goes without, and is told so.
Deviation: widths are uniform (UL-UM in the authors' code). Its AL-AM standardises scores in each
block and cuts at one threshold, which loses less (docs/experiments.md), but no plain configuration
can say a width for each block, and our own format holds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pocketlm.core.stats import Stat
from pocketlm.core.transform import Findings, Structure, Visit
from pocketlm.core.views import LinearView
from pocketlm.prune.moments import Moments
from pocketlm.prune.width import InputWidth, per_unit

BIAS = "bias"


class Flap(InputWidth):
    """FLAP: removes what fluctuates least and puts its mean into a bias.

    Attributes:
        compensate: Whether what is removed leaves its mean behind as a bias.
    """

    needs: ClassVar[tuple[type[Stat], ...]] = (Moments,)
    compensate: bool = True

    def statistic(self, width: int, columns: int, device: torch.device) -> Stat:
        """Means and variances."""
        return Moments(columns, device)

    def scores(self, structure: Structure, reader: LinearView, stat: Moments) -> Tensor:
        """Variance of the inputs times the columns' squared norm."""
        column_I = stat.variance_I() * reader.weight_OI().double().square().sum(0)
        return per_unit(column_I, structure, reader)

    def extra(
        self, structure: Structure, kept_U: Tensor, visit: Visit, stats: Mapping[str, Stat]
    ) -> dict[str, Tensor]:
        """The mean output of what is removed, for each reader."""
        if not self.compensate or len(kept_U) == structure.units:
            return {}
        found = {}
        for name in structure.readers:
            stat, reader = stats[name], visit.block.linears[name]
            assert isinstance(stat, Moments)
            mean_I = stat.mean_I().clone()
            kept_I = structure.cut_of(reader.tensor_name).index(kept_U.cpu(), structure.units)
            mean_I[kept_I.to(mean_I.device)] = 0
            found[f"{name}.{BIAS}"] = (reader.weight_OI().double() @ mean_I).float()
        return found

    def biases(
        self, readers: Sequence[str], findings: Findings | None
    ) -> Mapping[str, Tensor | None]:
        """The mean output of what each linear no longer reads."""
        if not self.compensate:
            return {}
        if findings is None:
            return dict.fromkeys(readers)
        found = {name: value for one in findings for name, value in one.items()}
        return {reader: found[f"{reader}.{BIAS}"] for reader in readers}
