"""Group testing by halves: finds the worst units in few measurements."""

from __future__ import annotations

import pytest

from pocketlm.search.bisect import find_worst, forecast


class Gains:
    """Known gains of units; a range gains their sum, times what interaction adds."""

    def __init__(self, gains: list[float], interaction: float = 0.0) -> None:
        self.gains, self.interaction, self.asked = gains, interaction, []

    def __call__(self, ranges):
        self.asked += ranges
        return [self.of(part) for part in ranges]

    def of(self, part) -> float:
        width = part[1] - part[0]
        return sum(self.gains[part[0] : part[1]]) * (1 + self.interaction * (width > 1))

    def worst(self, wanted: int, least: float = 0.0):
        return find_worst(len(self.gains), self.of((0, len(self.gains))), wanted, self, least)


def test_one_culprit_among_many_takes_a_logarithm_of_measurements():
    gains = Gains([0.001] * 128)
    gains.gains[77] = 1.0
    (found,) = gains.worst(1)
    assert found.units == (77, 78)
    assert found.gain == pytest.approx(1.0)
    assert len(gains.asked) <= 2 * 7


@pytest.mark.parametrize("interaction", [0.0, -0.1, 0.1])
def test_the_worst_come_in_order(interaction):
    gains = Gains([0.01 * ((i * 37) % 50) ** 2 for i in range(50)], interaction)
    found = gains.worst(3)
    best = sorted(range(50), key=lambda i: -gains.gains[i])[:3]
    assert [s.units[0] for s in found] == best
    assert all(s.measured and s.gain == gains.gains[s.units[0]] for s in found)


def test_all_units_can_be_asked_for():
    gains = Gains([3.0, 1.0, 2.0])
    assert [s.units[0] for s in gains.worst(9)] == [0, 2, 1]
    assert sorted(gains.asked) == [(0, 1), (1, 2), (2, 3)]


def test_what_gains_too_little_is_left_alone():
    gains = Gains([0.0] * 40 + [1.0] + [0.0] * 23)
    assert [s.units for s in gains.worst(5, least=0.01)] == [(40, 41)]
    assert len(gains.asked) < forecast(64, 5)


def test_no_range_is_measured_twice():
    gains = Gains([float(i % 7) for i in range(60)])
    gains.worst(10)
    assert len(gains.asked) == len(set(gains.asked))
