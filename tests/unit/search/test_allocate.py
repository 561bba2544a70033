"""The integer program against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from pocketlm.core.errors import BudgetError
from pocketlm.search.allocate import allocate, smallest


def everything(damages, prices, budget) -> float:
    """The least damage of any choice within the budget."""
    choices = itertools.product(*(range(len(row)) for row in damages))
    return min(
        sum(row[c] for row, c in zip(damages, choice, strict=True))
        for choice in choices
        if sum(row[c] for row, c in zip(prices, choice, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_better(seed: int):
    chance = random.Random(seed)
    scale = 10 ** chance.randint(0, 10)  # up to the bytes of a large model
    sizes = [chance.randint(1, 4) for _ in range(6)]
    prices = [sorted(chance.randint(1, 40) * scale + i for i in range(n)) for n in sizes]
    damages = [[chance.expovariate(1) * 10 ** -chance.randint(0, 5) for _ in row] for row in prices]
    least, most = smallest(prices), sum(max(row) for row in prices)
    for budget in {least, (least + most) // 2, most, chance.randint(least, most)}:
        chosen = allocate(damages, prices, budget)
        assert sum(row[c] for row, c in zip(prices, chosen, strict=True)) <= budget
        damage = sum(row[c] for row, c in zip(damages, chosen, strict=True))
        assert damage == pytest.approx(everything(damages, prices, budget), rel=1e-5, abs=1e-12)


def test_not_a_single_unit_of_price_over_the_budget():
    """A gain that is one byte too dear is left alone, at a scale where the solver rounds."""
    prices = [[10**10, 3 * 10**10 + 1], [10**10, 10**10 + 2 * 10**10]]
    assert allocate([[1.0, 0.0], [0.5, 0.0]], prices, 4 * 10**10) == [0, 1]


def test_a_budget_below_the_smallest_says_which_that_is():
    with pytest.raises(BudgetError, match="9 is below the smallest that is possible, 10"):
        allocate([[1.0, 0.0], [1.0, 0.0]], [[4, 8], [6, 8]], 9)


def test_a_model_of_eighty_blocks_is_quick():
    chance = random.Random(0)
    prices = [[(b + 1) * 1_000_003 * (1 + u % 5) for b in range(6)] for u in range(560)]
    damages = [[chance.uniform(1, 3) * 4.0**-b for b in range(6)] for u in range(560)]
    chosen = allocate(damages, prices, smallest(prices) * 3)
    assert len(chosen) == 560
