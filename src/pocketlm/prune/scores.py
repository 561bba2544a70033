"""What a weight is worth: one function a score; the weights of the least score go first.

A new score is a function of a few lines and its row in `SCORES`. Scores are compared within a row,
a matrix or a group of neighbours (`patterns`), so that factors common to all of them do not count.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.state import Statistics
from pocketlm.core.stats import GradientSize, Hessian, Stat
from pocketlm.prune.entropy import Entropy

DAMPING = 0.01  # share of the Hessian's mean diagonal that is added before it is inverted
GRADIENT_SHARE = 25.0  # α of GBLM


@dataclass(frozen=True)
class Score:
    """One way to rank weights.

    Attributes:
        of: The score [O, I] of a weight, from the statistics named.
        needs: Statistics of the inputs, and perhaps the gradient.
    """

    of: Callable[[Tensor, Statistics], Tensor]
    needs: tuple[type[Stat], ...] = (Hessian,)


def magnitude(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """|w|."""
    return weight_OI.abs()


def wanda(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """|w| · |x|₂ (arXiv:2306.11695); OBD's ½ w² H_ii ranks the same way."""
    return weight_OI.abs() * stats[Hessian].diagonal_I().sqrt()


def wanda_or_size(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """`wanda`, or |w| where no token reached the linear."""
    return wanda(weight_OI, stats) if stats[Hessian].reached else weight_OI.abs()


def obd(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """½ w² H_ii: the loss of one weight, interactions left out (LeCun et al. 1990)."""
    return 0.5 * weight_OI.square() * stats[Hessian].diagonal_I()


def ria(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """(|w| / Σ|row| + |w| / Σ|column|) · |x|₂^½ (RIA, arXiv:2402.17946, with its a = ½)."""
    size_OI = weight_OI.abs()
    tiny = torch.finfo(size_OI.dtype).tiny
    of_row_OI = size_OI / size_OI.sum(1, keepdim=True).clamp(min=tiny)
    of_column_OI = size_OI / size_OI.sum(0, keepdim=True).clamp(min=tiny)
    return (of_row_OI + of_column_OI) * stats[Hessian].diagonal_I().pow(0.25)


def obs(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """w² / [H⁻¹]_ii: the loss of one weight once the others have made up for it.

    Twice OBS's saliency (Hassibi and Stork 1992). SparseGPT takes the inverse of what is left of H
    once earlier columns are settled, as `prune.sweep` does.
    """
    factor = stats[Hessian].inverse_factor(DAMPING, None)
    return weight_OI.square() / factor.upper_II.square().sum(0)


def esparse(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """|w| · (|x|₂ + entropy of x): channels that tell much stay (E-Sparse, arXiv:2310.15929).

    Deviation: both count alike on the mean of all channels, whatever the scale of the activations;
    the paper adds them with a fixed factor.
    """
    norm_I = stats[Hessian].diagonal_I().sqrt()
    entropy_I = stats[Entropy].value_I()
    share_I = entropy_I / entropy_I.mean().clamp(min=torch.finfo(entropy_I.dtype).tiny)
    return weight_OI.abs() * (norm_I + norm_I.mean() * share_I)


def gblm(weight_OI: Tensor, stats: Statistics) -> Tensor:
    """|w| · (|x|₂ + α |g|₂), g the loss's gradient in w (GBLM-Pruner, arXiv:2311.04902).

    Both norms are root mean squares here, over tokens and over sequences. The paper's α = 100 is
    for sums over 128 sequences of 2048 tokens: 100 √128 / √2048 = 25.
    """
    size_I = (stats[Hessian].diagonal_I() / 2).sqrt()
    return weight_OI.abs() * (size_I + GRADIENT_SHARE * stats[GradientSize].size_OI)


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude, ()),
    "wanda": Score(wanda),
    "obd": Score(obd),
    "ria": Score(ria),
    "obs": Score(obs),
    "esparse": Score(esparse, (Hessian, Entropy)),
    "gblm": Score(gblm, (Hessian, GradientSize)),
}
