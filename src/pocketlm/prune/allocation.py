"""How sparse each linear becomes, given how sparse all of them shall be together.

An allocation looks once at the original model, block by block (`engine.survey`), and then gives
each linear a share of zeros whose mean over all weights is the asked one. Shares of N:M are fixed,
so that allocations are for unstructured pruning alone.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.state import BlockTask, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.prune.besa import BATCH_SIZE, ITERATIONS, learned_shares
from pocketlm.prune.scores import wanda, wanda_or_size

QUANTILES = 513  # of a linear's scores, for a threshold that all share
MOST = 0.95  # the largest share of zeros that an allocation gives


@dataclass(frozen=True)
class Allocation:
    """One way to spread sparsity over a model (core.state.Survey).

    Attributes:
        needs: Statistics of the original inputs.
        look: A few numbers of each linear of a block, from the block, statistics of what flows into
            its linears, by name, and the mean share.
        spread: Shares of zeros, by name, from those numbers, how many weights each linear has, and
            the mean share.
        sequences: How many `look` runs a block on, forward and back; 0: it only reads weights.
    """

    needs: tuple[type[Stat], ...]
    look: Callable[[BlockTask, Mapping[str, Statistics], float], Mapping[str, Sequence[float]]]
    spread: Callable[[Mapping[str, Sequence[float]], Mapping[str, int], float], Mapping[str, float]]
    sequences: int = 0


def owl(outlier: float = 5.0, reach: float = 0.08) -> Allocation:
    """Blocks with more outliers keep more (OWL, arXiv:2310.05175).

    An outlier is a weight whose |w| · |x|₂ exceeds `outlier` times the block's mean. Shares lie
    within `reach` of the mean share, linear in the outliers' part, one for all linears of a block.
    """

    def look(
        task: BlockTask, stats: Mapping[str, Statistics], mean: float
    ) -> Mapping[str, Sequence[float]]:
        scores = [wanda(state.reference_OI, stats[name]) for name, state in task.states.items()]
        count = sum(score_OI.numel() for score_OI in scores)
        middle = float(sum(score_OI.sum() for score_OI in scores)) / count
        part = sum(int((score_OI > outlier * middle).sum()) for score_OI in scores) / count
        return dict.fromkeys(task.states, (part,))

    def spread(
        looks: Mapping[str, Sequence[float]], sizes: Mapping[str, int], mean: float
    ) -> Mapping[str, float]:
        return _linear({name: -look[0] for name, look in looks.items()}, sizes, mean, reach)

    return Allocation((Hessian,), look, spread)


def samsp(reach: float = 0.1) -> Allocation:
    """Linears of larger Hessians keep more (sensitivity-aware mixed sparsity, arXiv:2310.09499).

    Shares lie within `reach` of the mean one, linear in a linear's place among all by sensitivity,
    as in the authors' code. Deviation: the sensitivity is the mean of the Hessian's diagonal, the
    Hessian that of the linear's output error; theirs is the trace of the loss's, by random probes
    through the whole model. A linear that no token reached counts as the least sensitive one.
    """

    def look(
        task: BlockTask, stats: Mapping[str, Statistics], mean: float
    ) -> Mapping[str, Sequence[float]]:
        return {name: (float(of[Hessian].diagonal_I().mean()),) for name, of in stats.items()}

    def spread(
        looks: Mapping[str, Sequence[float]], sizes: Mapping[str, int], mean: float
    ) -> Mapping[str, float]:
        traces = [look[0] for look in looks.values()]
        least = min((trace for trace in traces if trace > 0), default=1.0)
        ordered = sorted(max(trace, least) for trace in traces)
        places = {name: -bisect_left(ordered, max(look[0], least)) for name, look in looks.items()}
        return _linear(places, sizes, mean, reach)

    return Allocation((Hessian,), look, spread)


def one_threshold() -> Allocation:
    """The weights of least |w| · |x|₂ / (the linear's root mean square) go, wherever they are.

    One threshold for all linears, found on quantiles of their scores. Unscaled scores of different
    linears say little about each other: whole linears would go. One that no token reached goes by
    |w| over its root mean square.
    """

    def look(
        task: BlockTask, stats: Mapping[str, Statistics], mean: float
    ) -> Mapping[str, Sequence[float]]:
        return {
            name: _quantiles(wanda_or_size(state.reference_OI, stats[name]))
            for name, state in task.states.items()
        }

    def spread(
        looks: Mapping[str, Sequence[float]], sizes: Mapping[str, int], mean: float
    ) -> Mapping[str, float]:
        names, total = list(looks), sum(sizes[name] for name in looks)
        tables = torch.tensor([list(looks[name]) for name in names], dtype=torch.float64)
        weight_N = torch.tensor([sizes[name] for name in names], dtype=torch.float64) / total
        low, high = 0.0, float(tables.max())
        for _ in range(60):
            middle = (low + high) / 2
            below_N = (tables <= middle).double().mean(1)
            low, high = (middle, high) if float(below_N @ weight_N) < mean else (low, middle)
        below_N = (tables <= high).double().mean(1)
        return _exact(dict(zip(names, below_N.tolist(), strict=True)), sizes, mean)

    return Allocation((Hessian,), look, spread)


def besa() -> Allocation:
    """Learned within each block, whose mean share is the asked one (BESA; `prune.besa`)."""

    def spread(
        looks: Mapping[str, Sequence[float]], sizes: Mapping[str, int], mean: float
    ) -> Mapping[str, float]:
        return _exact({name: look[0] for name, look in looks.items()}, sizes, mean)

    return Allocation((Hessian,), learned_shares, spread, sequences=ITERATIONS * BATCH_SIZE)


def _quantiles(score_OI: Tensor) -> list[float]:
    ordered = score_OI.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, QUANTILES, device=ordered.device).long()
    return (ordered[places] / ordered.square().mean().sqrt().clamp(min=1e-30)).tolist()


def _linear(
    wish: Mapping[str, float], sizes: Mapping[str, int], mean: float, reach: float
) -> Mapping[str, float]:
    """Shares that rise linearly with a wish, over a range of 2 · reach around the mean share."""
    low, high = min(wish.values()), max(wish.values())
    width = (high - low) or 1.0
    shares = {name: 2 * reach * (value - low) / width for name, value in wish.items()}
    total = sum(sizes[name] for name in wish)
    middle = sum(share * sizes[name] for name, share in shares.items()) / total
    return _exact({name: mean + share - middle for name, share in shares.items()}, sizes, mean)


def _exact(
    shares: Mapping[str, float], sizes: Mapping[str, int], mean: float
) -> Mapping[str, float]:
    """Shares from 0 to `MOST` whose mean over all weights is the asked one."""
    total = sum(sizes[name] for name in shares)
    low, high = -1.0, 1.0
    for _ in range(60):
        moved = (low + high) / 2
        clipped = {name: min(max(share + moved, 0.0), MOST) for name, share in shares.items()}
        now = sum(share * sizes[name] for name, share in clipped.items()) / total
        low, high = (moved, high) if now < mean else (low, moved)
    return {name: min(max(share + high, 0.0), MOST) for name, share in shares.items()}


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "owl": owl,
    "samsp": samsp,
    "global": one_threshold,
    "besa": besa,
}
