"""The recipe of a choice gives each linear the chosen grid, in few lines."""

from __future__ import annotations

import random

from pocketlm.core.spec import QuantSpec
from pocketlm.models import open_model
from pocketlm.search.rewrite import with_grids

GRIDS = [QuantSpec(bits=bits, group_size=32) for bits in (2, 3, 4)]


def test_every_linear_gets_its_grid(model, recipe):
    chance = random.Random(0)
    shapes = model.linear_shapes()
    grids = {name: chance.choice(GRIDS) for name in shapes}
    written = with_grids(recipe, grids, shapes, model.block_paths)
    assert {name: written.spec_for(name) for name in shapes} == grids
    assert written.steps == recipe.steps
    assert written.ignore == recipe.ignore


def test_blocks_that_choose_alike_share_a_line(model, recipe):
    shapes = model.linear_shapes()
    grids = dict.fromkeys(shapes, GRIDS[1])
    for name in shapes:
        if "layers.1." not in name and name.endswith(("gate_proj", "up_proj")):
            grids[name] = GRIDS[0]
    written = with_grids(recipe, grids, shapes, model.block_paths)
    assert written.weights == GRIDS[1]
    assert list(written.overrides) == [r"re:model\.layers\.(0|2)\.(mlp\.gate_proj|mlp\.up_proj)$"]


def test_one_line_for_all_experts_of_a_layer(mixtral, recipe):
    model = open_model(mixtral)
    shapes = model.linear_shapes()
    grids = dict.fromkeys(shapes, GRIDS[2])
    grids.update({n: GRIDS[0] for n in shapes if ".experts." in n and "layers.1." in n})
    written = with_grids(recipe, grids, shapes, model.block_paths)
    assert len(written.overrides) == 1
    assert {name: written.spec_for(name) for name in shapes} == grids


def test_a_single_expert_apart_gets_its_own_line(mixtral, recipe):
    model = open_model(mixtral)
    shapes = model.linear_shapes()
    grids = dict.fromkeys(shapes, GRIDS[2])
    grids[next(n for n in shapes if ".experts.2." in n)] = GRIDS[0]
    written = with_grids(recipe, grids, shapes, model.block_paths)
    assert {name: written.spec_for(name) for name in shapes} == grids
