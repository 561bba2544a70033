"""What is measured in the time, and how the rest is filled."""

from __future__ import annotations

import pytest

from pocketlm.core.spec import QuantSpec
from pocketlm.search.table import anchor, choose_cells, filled, undominated
from pocketlm.search.units import Candidate, Unit

ERRORS = [0.2, 0.05, 0.01, 0.00005]


def unit(block: int, kind: str = "mlp.up_proj", prices=(2, 3, 4, 8)) -> Unit:
    spec = QuantSpec(bits=4)
    candidates = tuple(Candidate(spec, {}, bits=p, file_bytes=p) for p in prices)
    return Unit(f"{block}.{kind}", block, (), 1, candidates)


def test_the_anchor_is_the_coarsest_grid_whose_error_is_moderate():
    assert anchor(ERRORS) == 1
    assert anchor([0.5, 0.3, 0.15]) == 2
    assert anchor([0.01, 0.001]) == 0


def test_a_candidate_that_another_beats_is_dropped():
    assert undominated(unit(0), [0.2, 0.05, 0.06, 0.05]) == [0, 1]
    assert undominated(unit(0), ERRORS) == [0, 1, 2, 3]
    assert undominated(unit(0, prices=(2, 2, 3, 4)), [0.2, 0.2, 0.1, 0.01]) == [0, 2, 3]


def test_the_time_decides_what_is_measured():
    units = [unit(block) for block in range(9)]
    errors = [ERRORS] * 9

    def seconds(variants):
        return float(len(variants))

    cells, note = choose_cells(units, errors, seconds, 27)
    assert len(cells) == 27  # all but the tiny error
    assert note is None
    cells, note = choose_cells(units, errors, seconds, 9)
    assert cells == [(u, 1) for u in range(9)]
    assert note is not None
    assert "--search-minutes" not in note
    cells, note = choose_cells(units, errors, seconds, 5)  # the least there is
    assert cells == [(u, 1) for u in range(9)]
    assert "more than --search-minutes" in (note or "")


def test_damage_follows_the_error_from_the_nearest_measured_grid():
    table = filled([ERRORS], {(0, 1): 0.5, (0, 2): 0.2})
    assert table == [[pytest.approx(0.5 * 4), 0.5, 0.2, pytest.approx(0.2 * 0.005)]]


def test_a_damage_of_zero_stays_finite():
    assert filled([[0.1, 0.2]], {(0, 0): 0.0})[0][1] < 1e-10
