"""Ranks for all linears of a model within one budget: directions go where they save most.

Dropping direction i of a linear costs σ_i² of |W X|², σ_i the singular values of the whitened
weight (`svd_llm`). Relative to the linear's whole output, e_i = σ_i² / Σ σ², that is comparable
between linears (SVD-LLM V2, arXiv:2503.12340, compares truncation losses of linears of
one kind and shares out ratios by them). A direction of an O x I linear costs O + I parameters. The
least
    Σ over linears of w Σ over dropped i of e_i
within a number of parameters is reached by taking directions in the order of falling
e_i w / (O + I): each linear's are falling already, so that the greedy choice is optimal up to the
last direction. A linear whose factors would be as large as the weight keeps the weight.

Deviation: one budget for the whole model in place of one for each kind of linear, and the greedy
optimum in place of the paper's formula.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pocketlm.core.errors import BudgetError


@dataclass(frozen=True)
class Spectrum:
    """How much each direction of a linear carries.

    Attributes:
        shape: (O, I).
        energy_R: Squared singular values of the whitened weight, falling, all min(O, I) of them.
        weight: How much the model suffers from a relative error of this linear; 1: as any other.
    """

    shape: tuple[int, int]
    energy_R: Tensor
    weight: float = 1.0

    @property
    def each(self) -> int:
        """Parameters of one direction."""
        return sum(self.shape)

    @property
    def most(self) -> int:
        """The largest rank whose factors are smaller than the weight."""
        rows, columns = self.shape
        return (rows * columns - 1) // (rows + columns)


def allocate_ranks(
    spectra: Mapping[str, Spectrum], ratio: float, multiple_of: int = 1
) -> dict[str, int]:
    """The rank of each linear.

    Args:
        spectra: Module path → its spectrum.
        ratio: Share of all their parameters to remove, from 0 to below 1.
        multiple_of: Directions that are taken together: ranks are multiples of it, but for linears
            whose largest rank is smaller.

    Returns:
        Module path → rank; 0 where the linear keeps its weight. What all take together is at most
        the share 1 - ratio of the parameters.

    Raises:
        BudgetError: If not even the least ranks fit; says the largest ratio that does.
    """
    whole = sum(s.shape[0] * s.shape[1] for s in spectra.values())
    budget = int((1 - ratio) * whole)
    start = {name: min(multiple_of, s.most) for name, s in spectra.items()}
    left = budget - sum(rank * spectra[name].each for name, rank in start.items())
    if left < 0:
        most = 1 - sum(rank * spectra[name].each for name, rank in start.items()) / whole
        raise BudgetError(
            f"ranks of {multiple_of} already take more than {1 - ratio:.1%} of the parameters.",
            where="ratio",
            remedy=f"The largest ratio possible is {most:.3f}.",
        )
    if ratio == 0:
        return dict.fromkeys(spectra, 0)
    shares = {name: _shares(spectrum) for name, spectrum in spectra.items()}
    ranks = dict(start)
    waiting: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        after = ranks[name] + multiple_of
        if after <= spectra[name].most:
            heapq.heappush(waiting, (-sum(shares[name][ranks[name] : after]), name))

    for name in spectra:
        offer(name)
    while waiting:
        _, name = heapq.heappop(waiting)
        price = multiple_of * spectra[name].each
        if price <= left:
            ranks[name], left = ranks[name] + multiple_of, left - price
            offer(name)
    return _whole_again(ranks, spectra, multiple_of, left)


def _shares(spectrum: Spectrum) -> list[float]:
    """What each direction is worth for a parameter."""
    total = float(spectrum.energy_R.sum()) or 1.0
    worth = spectrum.energy_R.double() * (spectrum.weight / (total * spectrum.each))
    return worth.tolist()


def _whole_again(
    ranks: dict[str, int], spectra: Mapping[str, Spectrum], multiple_of: int, left: int
) -> dict[str, int]:
    """Gives linears at their largest rank the whole weight back where what is left pays for it."""
    full = sorted(n for n, rank in ranks.items() if rank + multiple_of > spectra[n].most)
    for name in full:
        spectrum = spectra[name]
        more = spectrum.shape[0] * spectrum.shape[1] - ranks[name] * spectrum.each
        if more <= left:
            ranks[name], left = 0, left - more
    return ranks
