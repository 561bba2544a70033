"""Specs are validated, name the nearest key, and survive JSON."""

from __future__ import annotations

import pytest

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec, Recipe, matches, parse_scheme


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'group_size'"):
        QuantSpec.parse({"groupsize": 64})


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="bits"):
        QuantSpec.parse({"bits": bits})


@pytest.mark.parametrize(
    ("asked", "columns", "fitted"),
    [
        (128, 4096, 128),
        (128, 576, 64),
        (128, 96, 32),
        (64, 1536, 64),
        (128, 50, None),
        (None, 50, None),
    ],
)
def test_group_size_that_does_not_divide(
    asked: int | None, columns: int, fitted: int | None
) -> None:
    assert QuantSpec(group_size=asked).fit(columns).group_size == fitted


def test_scheme_names() -> None:
    assert parse_scheme("w3a16") == QuantSpec(bits=3, group_size=128)
    with pytest.raises(ConfigError, match="W4A16"):
        parse_scheme("W4A61")


def test_real_bits() -> None:
    assert QuantSpec(bits=4, group_size=64).bits_per_weight(576) == 4.25
    assert QuantSpec(bits=3, symmetric=False, group_size=32).bits_per_weight(64) == 3 + 19 / 32


def test_recipe_round_trip_and_rules() -> None:
    recipe = Recipe.parse(
        {
            "steps": ["clip", {"method": "gptq", "damping": 0.02}],
            "weights": {"bits": 4, "group_size": 64},
            "overrides": {"*.down_proj": {"bits": 8, "group_size": 64}},
            "ignore": ["re:.*layers\\.0\\."],
        }
    )
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.steps[1].options == {"damping": 0.02}
    assert recipe.spec_for("model.layers.0.mlp.up_proj") is None
    assert recipe.spec_for("model.layers.1.mlp.down_proj") == QuantSpec(bits=8, group_size=64)
    assert recipe.spec_for("model.layers.1.mlp.up_proj") == QuantSpec(bits=4, group_size=64)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("Linear", "a.b", True),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("*.up_proj", "model.layers.0.mlp.up_proj", True),
        ("re:model.*gate$", "model.mlp.gate", True),
        ("re:gate", "model.mlp.gate", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected
