"""What is chosen together, and from what."""

from __future__ import annotations

import pytest

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.spec import SCHEMES, QuantSpec, Recipe
from pocketlm.engine.grids import choose_grids
from pocketlm.models import open_model
from pocketlm.search.units import Unit, choice_units, default_candidates


def units_of(model, recipe: Recipe, target: str, candidates=None) -> list[Unit]:
    grids = choose_grids(model.linear_shapes(), model.stores_transposed, recipe, target)
    return choice_units(model, recipe, grids, candidates or default_candidates(recipe), target)


def test_each_linear_by_itself_for_transformers(model, recipe):
    units = units_of(model, recipe, "transformers")
    assert len(units) == 21
    assert all(len(unit.linears) == 1 for unit in units)
    assert units[0].name == "model.layers.0.self_attn.q_proj"
    assert [unit.block for unit in units[::7]] == [0, 1, 2]
    assert [c.spec.bits for c in units[0].candidates] == [2, 3, 4, 5, 6, 8]


def test_what_an_engine_fuses_is_one_unit_and_what_it_cannot_run_no_candidate(model, recipe):
    units = units_of(model, recipe, "vllm")
    assert [len(unit.linears) for unit in units[:4]] == [3, 1, 2, 1]
    assert {c.spec.bits for unit in units for c in unit.candidates} == {4, 8}
    assert units[0].weights == 64 * (64 + 32 + 32)


def test_experts_of_a_layer_are_one_unit(mixtral, recipe):
    units = units_of(open_model(mixtral), recipe, "transformers")
    experts = [unit for unit in units if unit.name.endswith("experts")]
    assert [len(unit.linears) for unit in experts] == [12, 12, 12]
    assert len(units) == 3 * (4 + 1)


def test_each_part_of_the_experts_is_a_unit_where_it_is_a_stack_of_its_own(mixtral, recipe):
    units = units_of(open_model(mixtral), recipe, "llama.cpp")
    experts = [unit for unit in units if ".experts." in unit.name]
    assert [unit.name.rpartition(".")[2] for unit in experts[:3]] == ["w1", "w3", "w2"]
    assert all(len(unit.linears) == 4 for unit in experts)
    assert len(units) == 3 * (4 + 3)


def test_experts_share_groups_that_divide_the_columns_of_all(mixtral):
    recipe = Recipe.parse({"steps": ["rtn"], "weights": {"bits": 4, "group_size": 128}})
    model = open_model(mixtral)
    shapes = model.linear_shapes()
    grids = choose_grids(shapes, model.stores_transposed, recipe, "transformers")
    experts = {name: spec for name, spec in grids.specs.items() if ".experts." in name}
    assert {shapes[name][1] for name in experts} == {64, 96}
    assert {spec.group_size for spec in experts.values()} == {32}
    for unit in units_of(model, recipe, "transformers"):
        if unit.name.endswith("experts"):
            for candidate in unit.candidates:
                assert len(set(candidate.specs.values())) == 1


def test_prices_count_scales_and_in_bytes_the_padding(model, recipe):
    down = next(
        u for u in units_of(model, recipe, "transformers") if u.name.endswith("mlp.down_proj")
    )
    three = down.candidates[1]
    assert three.bits == 64 * 96 * 3 + 64 * 3 * 16
    assert three.file_bytes == 64 * (9 * 4) + 64 * 3 * 2 + 16


def test_grids_that_fit_alike_are_one_candidate(model, recipe):
    asked = [QuantSpec(bits=4, group_size=size) for size in (128, 64, 32)]
    units = units_of(model, recipe, "transformers", asked)
    by_kind = {unit.name.split(".", 3)[-1]: unit for unit in units}
    assert [c.spec.group_size for c in by_kind["mlp.up_proj"].candidates] == [128, 32]
    assert [c.spec.group_size for c in by_kind["mlp.down_proj"].candidates] == [128]


def test_what_an_override_names_is_not_chosen(model, recipe):
    eight = QuantSpec(bits=8, group_size=32)
    fixed = recipe.model_copy(update={"overrides": {"down_proj": eight}})
    kinds = {unit.name.split(".", 3)[-1] for unit in units_of(model, fixed, "transformers")}
    assert "mlp.down_proj" not in kinds
    assert len(kinds) == 6
    with pytest.raises(ConfigError, match="nothing is left to choose"):
        units_of(model, recipe.model_copy(update={"overrides": {"Linear": eight}}), "transformers")


def test_zero_points_where_the_target_decodes_by_one_grid(model, recipe):
    asymmetric = recipe.weights.model_copy(update={"symmetric": False})
    with pytest.raises(UnsupportedLayer, match="one grid"):
        units_of(model, recipe.model_copy(update={"weights": asymmetric}), "transformers")


def test_a_number_format_of_one_width_leaves_nothing_to_choose(model, recipe):
    nvfp4 = recipe.model_copy(update={"weights": SCHEMES["NVFP4"]})
    with pytest.raises(ConfigError, match="NVFP4 has one width"):
        default_candidates(nvfp4)
    named = [SCHEMES["NVFP4"], SCHEMES["FP8_CHANNEL"]]
    units = units_of(model, nvfp4, "transformers", named)
    assert [c.spec.name for c in units[0].candidates] == ["NVFP4", "FP8_CHANNEL"]


def test_no_candidate_that_the_target_runs(model, recipe):
    with pytest.raises(UnsupportedLayer, match="no kernel for symmetric 3 bits"):
        units_of(model, recipe, "vllm", [QuantSpec(bits=3, group_size=32)])
