"""What a method's name stands for, alone and together with a number format."""

from __future__ import annotations

import pytest

from pocketlm.catalog import known_methods, method_class
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Recipe
from pocketlm.recipes import build_recipe, read_recipe
from pocketlm.search.ranks import wants_ranks
from pocketlm.stages import split


def test_every_method_can_be_shown_with_its_defaults() -> None:
    for name in known_methods():
        step = method_class(name).parse({})
        assert step.model_dump(mode="json") is not None
        assert method_class(name).__doc__


def names(**flags: object) -> list[str]:
    return [step.method for step in build_recipe(**flags).steps]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "svd_llm", "losparse"])
def test_factors_alone_stay_floats(method: str) -> None:
    recipe = build_recipe(method=method)
    assert recipe.weights is None
    assert [step.method for step in recipe.steps] == [method]


def test_factors_and_a_number_format_are_both_done() -> None:
    assert names(method="svd_llm", scheme="W8A16") == ["svd_llm", "clip", "gptq", "refine"]


def test_repairs_come_after_what_they_repair() -> None:
    assert names(method="lqer", bits=3) == ["clip", "gptq", "refine", "lqer"]
    assert names(method="lorc") == ["rtn", "lorc"]
    assert names(method="caldera") == ["clip", "gptq", "caldera", "gptq", "caldera"]


def test_a_share_is_the_ratio_of_what_makes_factors() -> None:
    recipe = build_recipe(method="svd_llm", sparsity=0.3)
    assert [(s.method, s.options) for s in recipe.steps] == [("svd_llm", {"ratio": 0.3})]
    assert recipe.weights is None


@pytest.mark.parametrize("method", ["svd", "wanda"])
def test_a_recipe_that_quantizes_nothing_needs_no_number_format(method: str) -> None:
    assert read_recipe({"steps": ["depth", method]}).weights is None
    assert read_recipe({"steps": [method, "rtn"]}).weights is not None


def test_what_cannot_follow_a_smaller_model_is_refused_before_work() -> None:
    recipe = read_recipe({"steps": ["depth", "gptq", "wanda"]})
    with pytest.raises(ConfigError, match="wanda comes after gptq"):
        split(recipe)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        ({"method": "svd_llm", "allocation": "energy"}, True),
        ({"method": "svd_llm", "ratio": 0.3}, False),
        ({"method": "wanda", "sparsity": 0.5, "allocation": "owl"}, False),
    ],
)
def test_ranks_are_measured_for_factors_alone(step: dict[str, object], wanted: bool) -> None:
    """A pruning step has allocations too, which need no model opened for ranks."""
    assert wants_ranks(Recipe.parse({"steps": [step], "weights": None})) == wanted
