"""What a budget allows, and what is spent before."""

from __future__ import annotations

import pytest
import torch
from tests.unit.search.test_units import units_of

from pocketlm.core.errors import BudgetError, ConfigError
from pocketlm.core.spec import QuantSpec
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.plan import stored_sizes
from pocketlm.search.budget import Budget, room, spent


@pytest.fixture
def parts(model, recipe):
    fixed = recipe.model_copy(update={"overrides": {"o_proj": QuantSpec(bits=8, group_size=32)}})
    grids = choose_grids(model.linear_shapes(), model.stores_transposed, fixed, "transformers")
    units = units_of(model, fixed, "transformers")
    return grids, units


def test_everything_outside_the_units_is_counted(model, parts):
    grids, units = parts
    before = spent(model, grids, units, None)
    chosen = sum(c.file_bytes for unit in units for c in unit.candidates if c.spec.bits == 4)
    written = stored_sizes(model, grids, None)["output"]
    headers = before.file_bytes + chosen - written
    assert 0 < headers < 100 * 300
    assert before.bits == 3 * 64 * 64 * 8 + 3 * 64 * 2 * 16  # the fixed o_proj
    assert before.weights == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    kept = 2 * 97 * 64 + 7 * 64  # embedding, head, norms
    assert before.kept_bytes == 4 * kept
    assert spent(model, grids, units, torch.bfloat16).kept_bytes == 2 * kept


def test_bits_are_an_average_over_all_compressed_linears(model, parts):
    grids, units = parts
    before = spent(model, grids, units, None)
    prices, allowed = room(Budget(bits=4.0), units, before)
    assert allowed == 4 * before.weights - before.bits
    assert prices[0] == [c.bits for c in units[0].candidates]


def test_below_the_smallest_possible(model, parts):
    grids, units = parts
    before = spent(model, grids, units, None)
    least = before.bits + sum(unit.candidates[0].bits for unit in units)
    with pytest.raises(BudgetError, match=rf"smallest possible, {least / before.weights:.2f}"):
        room(Budget(bits=2.0), units, before)
    least = before.file_bytes + sum(unit.candidates[0].file_bytes for unit in units)
    with pytest.raises(BudgetError, match=f"smallest possible, {least:,}, of which"):
        room(Budget(file_bytes=least - 1), units, before)
    assert room(Budget(file_bytes=least), units, before)[1] == least - before.file_bytes


@pytest.mark.parametrize("given", [{}, {"bits": 3.5, "file_bytes": 10}, {"bits": -1.0}])
def test_one_budget_and_a_possible_one(given):
    with pytest.raises(ConfigError):
        Budget(**given)
