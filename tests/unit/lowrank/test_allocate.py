"""Ranks for a whole model within one budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from pocketlm.core.errors import BudgetError
from pocketlm.lowrank.allocate import Spectrum, allocate_ranks


def spectrum(rows: int, columns: int, fall: float, weight: float = 1.0) -> Spectrum:
    return Spectrum((rows, columns), fall ** torch.arange(float(min(rows, columns))), weight)


SPECTRA = {
    "flat": spectrum(12, 12, 0.95),
    "steep": spectrum(12, 12, 0.5),
    "wide": spectrum(8, 24, 0.8),
}


def parameters(ranks: dict[str, int]) -> int:
    return sum(
        rank * SPECTRA[n].each if rank else SPECTRA[n].shape[0] * SPECTRA[n].shape[1]
        for n, rank in ranks.items()
    )


def damage(ranks: dict[str, int]) -> float:
    total = 0.0
    for name, rank in ranks.items():
        energy_R, weight = SPECTRA[name].energy_R, SPECTRA[name].weight
        total += weight * float(energy_R[rank:].sum() / energy_R.sum()) if rank else 0.0
    return total


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_no_other_ranks_within_the_budget_lose_much_less(ratio: float) -> None:
    whole = parameters(dict.fromkeys(SPECTRA, 0))
    found = allocate_ranks(SPECTRA, ratio)
    assert parameters(found) <= (1 - ratio) * whole
    best = min(
        damage(dict(zip(SPECTRA, ranks, strict=True)))
        for ranks in itertools.product(*(range(1, s.most + 1) for s in SPECTRA.values()))
        if parameters(dict(zip(SPECTRA, ranks, strict=True))) <= (1 - ratio) * whole
    )
    assert damage(found) <= best + 0.08  # the last direction may be one that does not fit


def test_directions_are_taken_in_multiples() -> None:
    found = allocate_ranks(SPECTRA, 0.4, multiple_of=2)
    assert all(rank % 2 == 0 for rank in found.values())
    assert 0 < parameters(found) <= 0.6 * parameters(dict.fromkeys(SPECTRA, 0))


def test_what_matters_more_gets_more() -> None:
    plain = allocate_ranks(SPECTRA, 0.6)
    heavy = {**SPECTRA, "flat": spectrum(12, 12, 0.95, weight=50.0)}
    assert allocate_ranks(heavy, 0.6)["flat"] > plain["flat"]


def test_ratio_zero_keeps_every_weight_and_an_impossible_one_says_what_is_possible() -> None:
    assert set(allocate_ranks(SPECTRA, 0).values()) == {0}
    with pytest.raises(BudgetError, match=r"largest ratio possible is 0\.\d+"):
        allocate_ranks(SPECTRA, 0.99)
