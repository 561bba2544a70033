"""Paired differences: intervals, McNemar's test, verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from pocketlm.evaluate.bootstrap import Interval, item_interval, mean_interval
from pocketlm.evaluate.paired import change_interval, judge, mcnemar, more_items, share_interval


def table(both: int, lost: int, won: int, neither: int):
    """Scores of the model and of the original."""
    original = [1] * both + [1] * lost + [0] * won + [0] * neither
    model = [1] * both + [0] * lost + [1] * won + [0] * neither
    return np.array(model, float), np.array(original, float)


def test_mcnemar_counts_only_what_differs():
    # 2 * P(Bin(12, 1/2) <= 2) = 2 * (1 + 12 + 66) / 4096
    assert mcnemar(*table(50, 10, 2, 9)) == pytest.approx(2 * 79 / 4096)
    assert mcnemar(*table(500, 10, 2, 900)) == mcnemar(*table(50, 10, 2, 9))
    assert mcnemar(*table(5, 0, 0, 5)) == 1.0
    assert mcnemar(np.array([0.5, 1.0]), np.array([1.0, 1.0])) is None


def test_the_interval_of_a_change_by_hand():
    # b + 1/2 = 12.5, c + 1/2 = 4.5, n + 2 = 102
    change = change_interval(*table(60, 12, 4, 24))
    assert change.value == pytest.approx(-0.08)
    half = 1.959964 * np.sqrt(17 - 8**2 / 102) / 102
    assert change.low == pytest.approx(-8 / 102 - half, abs=1e-6)
    assert change.high == pytest.approx(-8 / 102 + half, abs=1e-6)


def test_no_difference_on_few_items_proves_little():
    few, many = (change_interval(*table(n, 0, 0, 0)) for n in (50, 500))
    assert judge(few, 0.01) == "inconclusive"
    assert judge(many, 0.01) == "pass"


def test_its_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        lost, won = generator.multinomial(200, [0.06, 0.02, 0.92])[:2]
        change = change_interval(*table(200 - lost - won, lost, won, 0))
        held += change.low <= -0.04 <= change.high
    assert 0.93 < held / 2000 < 0.975


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.005, 0.02, "pass"),
        (-0.009, -0.001, "pass"),  # surely worse, surely by less than is tolerated
        (-0.03, -0.001, "regression"),
        (-0.03, 0.001, "inconclusive"),
    ],
)
def test_verdicts(low, high, verdict):
    assert judge(Interval(value=(low + high) / 2, low=low, high=high), 0.01) == verdict


@pytest.mark.parametrize(("lost", "won"), [(6, 4), (30, 24)])
def test_that_many_more_items_would_decide(lost, won):
    before = change_interval(*table(280 - lost - won, lost, won, 20))
    assert judge(before, 0.01) == "inconclusive"
    times = 1 + more_items(before, 300, 0.01) / 300
    grown = table(*(round(n * times * 1.02) for n in (280 - lost - won, lost, won, 20)))
    assert judge(change_interval(*grown), 0.01) != "inconclusive"


def test_scores_that_are_no_answers_are_bootstrapped():
    generator = np.random.default_rng(1)
    scores = generator.random(40)
    ours, plain = item_interval(scores), mean_interval(scores)
    assert ours.value == plain.value
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=5e-3)
    assert share_interval(scores) == ours
    whole = share_interval(np.ones(20))
    assert whole.low < 0.9 < whole.high == 1.0
