"""A whole search on a tiny model: interrupted, resumed, asked again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import BudgetError, ResourceError
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.engine.grids import choose_grids
from pocketlm.models import open_model
from pocketlm.search import divergence, measure
from pocketlm.search.budget import Budget
from pocketlm.search.errors import Energy
from pocketlm.search.results import SearchResult
from pocketlm.search.run import Question, run_search
from pocketlm.search.store import Store

RECIPE = Recipe.parse(
    {"steps": ["clip", "rtn"], "weights": {"bits": 4, "group_size": 32}, "ignore": ["lm_head"]}
)
GRIDS = tuple(QuantSpec(bits=bits, group_size=32) for bits in (3, 4, 6))


def question(recipe, bits: float | None = 4.5, **changes) -> Question:
    budget = None if bits is None else Budget(bits=bits)
    settings = {
        "recipe": recipe, "target": "transformers", "budget": budget, "candidates": GRIDS,
        "dtype": None, "limit_seconds": 3600.0,
    }  # fmt: skip
    return Question(**{**settings, **changes})


@pytest.fixture(scope="module")
def searched(llama, windows, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    """A finished search and where its findings lie."""
    root = tmp_path_factory.mktemp("findings")
    return root, run_search(open_model(llama), windows, question(RECIPE), root)


def test_the_recipe_keeps_to_the_budget_and_beats_uniform(model, searched):
    found = searched[1]
    assert found.recipe is not None
    assert found.chosen is not None
    assert 4.3 < found.chosen.bits_per_weight <= 4.5
    uniform = next(p for p in found.uniform if p.bits_per_weight == 4.5)
    assert found.chosen.damage < uniform.damage
    shapes = model.linear_shapes()
    grids = choose_grids(shapes, False, found.recipe, "transformers")
    bits = sum(spec.stored_bits(shapes[name]) for name, spec in grids.specs.items())
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert bits / weights == pytest.approx(found.chosen.bits_per_weight)
    damages = [point.damage for point in found.frontier]
    assert damages == sorted(damages, reverse=True)
    assert len({unit.chosen for unit in found.units}) > 1


def test_a_later_budget_measures_nothing(llama, windows, searched, monkeypatch):
    root, first = searched

    def refuse(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "measure_energies", refuse)
    monkeypatch.setattr(measure, "measure_divergences", refuse)
    assert run_search(open_model(llama), windows, question(RECIPE), root).recipe == first.recipe
    other = run_search(open_model(llama), windows, question(RECIPE, 5.5), root)
    assert other.recipe != first.recipe
    assert other.units[0].damages == first.units[0].damages
    changed = Windows(windows.tokens_NT[:2], "random", "0" * 64, bos=False, seed=1)
    with pytest.raises(AssertionError, match="measured again"):  # another text, other findings
        run_search(open_model(llama), changed, question(RECIPE), root)


class Stopped(Exception):
    """What ends a search in a test."""


@pytest.mark.parametrize("stop_at", [pytest.param("output errors", marks=pytest.mark.slow), "KL"])
def test_an_interrupted_search_goes_on(llama, windows, searched, tmp_path, stop_at, monkeypatch):
    monkeypatch.setattr(divergence, "HELD_MOST", 4)

    def stop(event):
        if event.kind == "progress" and event.text == stop_at and event.done >= 50:
            raise Stopped

    with pytest.raises(Stopped):
        run_search(open_model(llama), windows, question(RECIPE), tmp_path, stop)
    (path,) = tmp_path.glob("*/findings.jsonl")
    lines = path.read_text("utf-8").splitlines()
    done = sum('"linear"' in line or '"unit"' in line for line in lines)
    assert 0 < done < 21 * len(GRIDS) * 2
    with path.open("a", encoding="utf-8") as file:
        file.write('{"linear": "model.lay')  # a line that a kill cut off
    resumed = run_search(open_model(llama), windows, question(RECIPE), tmp_path)
    assert resumed.recipe == searched[1].recipe
    after = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
    assert after[: len(lines)] == lines
    assert len(after) == len(set(after))  # nothing was measured twice


def test_little_time_measures_one_grid_a_unit_and_says_so(model, windows, tmp_path):
    found = run_search(model, windows, question(RECIPE, limit_seconds=0.0), tmp_path)
    assert {sum(unit.measured) for unit in found.units} == {1}
    assert any("more than --search-minutes" in note for note in found.notes)
    assert all(damage >= 0 for unit in found.units for damage in unit.damages)


def test_a_budget_that_is_too_small_is_refused_before_any_work(
    model, windows, tmp_path
):  # fmt: skip
    with pytest.raises(BudgetError, match=r"smallest possible, 3\.500"):
        run_search(model, windows, question(RECIPE, 3.4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_size_says_what_of_it_is_not_up_for_choice(model, windows, searched):
    budget = Budget(file_bytes=200_000)
    recipe = RECIPE.model_copy(update={"ignore": ("embed_tokens", "lm_head")})
    found = run_search(model, windows, question(recipe, budget=budget), searched[0])
    assert found.chosen is not None
    assert found.chosen.file_bytes <= 200_000
    kept = 4 * (2 * 97 * 64 + 7 * 64)
    assert any(f"{kept:,} bytes of the budget (26 %)" in note for note in found.notes)


def test_without_a_budget_the_frontier_alone(model, windows, tmp_path):
    grids = (QuantSpec(bits=3, group_size=32), QuantSpec(bits=5, group_size=32))
    found = run_search(model, windows, question(RECIPE, None, candidates=grids), tmp_path)
    assert found.recipe is None
    assert found.chosen is None
    assert [len(unit.grids) for unit in found.units] == [2] * 21
    assert found.frontier[0].bits_per_weight == 3.5
    assert found.frontier[-1].bits_per_weight == 5.5


def test_findings_by_content(tmp_path):
    spec = QuantSpec(bits=3)
    store = Store(tmp_path, {"source": "a"})
    store.keep_energy("linear", spec, Energy(1.0, 2.0, 3))
    store.keep_divergence({"linear": spec}, 0.25)
    store.keep_choice(["question"], ([(0, 1)], None))
    again = Store(tmp_path, {"source": "a"})
    assert again.energy("linear", spec) == Energy(1.0, 2.0, 3)
    assert again.divergence({"linear": spec}) == 0.25
    assert again.choice(["question"]) == ([(0, 1)], None)
    assert again.energy("linear", QuantSpec(bits=4)) is None
    other = Store(tmp_path, {"source": "b"})
    assert other.divergence({"linear": spec}) is None


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ResourceError, match="--search-dir"):
        Store(Path(tmp_path / "file"), {})
