"""K-quants: what the search finds, what feedback and refinement gain on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import GGUF_TYPES, QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import PackedFloat
from pocketlm.quant.block_grid import block_scale
from pocketlm.quant.clip import Clip
from pocketlm.quant.fake_quant import LearnedGrid
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.grid import Grid, minmax_grid, round_to_grid, searched_grid
from pocketlm.quant.refine import Refine
from pocketlm.quant.rtn import Rtn

K_TYPES = {name: spec for name, spec in GGUF_TYPES.items() if spec.type == "k"}


def weight(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator)
    return plain * torch.rand(rows, 1, generator=generator) * 0.1


def lost(weight_OI: Tensor, back_OI: Tensor, importance_I: Tensor) -> float:
    return float(((back_OI - weight_OI).square() * importance_I).sum())


@pytest.mark.parametrize("name", K_TYPES)
def test_the_search_beats_the_whole_range(name: str) -> None:
    spec, weight_OI = K_TYPES[name], weight()
    importance_I = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    ends = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.float16), spec)
    equal = round_to_grid(weight_OI, searched_grid(weight_OI, spec, torch.float16), spec)
    wise_grid = searched_grid(weight_OI, spec, torch.float16, importance_I)
    wise = round_to_grid(weight_OI, wise_grid, spec)
    errors = [lost(weight_OI, p.dequantize(), importance_I) for p in (ends, equal, wise)]
    assert errors[2] < errors[1] < errors[0]
    plain = torch.ones(512)
    assert lost(weight_OI, equal.dequantize(), plain) < lost(weight_OI, wise.dequantize(), plain)


@pytest.mark.parametrize("name", K_TYPES)
def test_weights_on_the_grid_are_found_again(name: str) -> None:
    """What a file of that type holds loses next to nothing when it is searched again."""
    spec = K_TYPES[name]
    first = round_to_grid(weight(), searched_grid(weight(), spec, torch.float16), spec)
    exact_OI = first.dequantize()
    again = round_to_grid(exact_OI, searched_grid(exact_OI, spec, torch.float16), spec)
    before = lost(weight(), exact_OI, torch.ones(512))
    assert lost(exact_OI, again.dequantize(), torch.ones(512)) < 0.35 * before


@pytest.mark.parametrize("value", [0.0, 1e-9, -3e-2, 700.0])
def test_constant_and_tiny_weights(value: float) -> None:
    for spec in K_TYPES.values():
        weight_OI = torch.full((2, 256), value)
        weight_OI[1, 100:] = 0
        packed = round_to_grid(weight_OI, searched_grid(weight_OI, spec, torch.float16), spec)
        assert packed.is_finite
        off = (packed.dequantize() - weight_OI).abs().max()
        assert off <= 0.02 * abs(value) + 1e-6


def test_columns_that_no_token_excites_stay_near_their_weights() -> None:
    spec, weight_OI = K_TYPES["Q4_K"], weight()
    importance_I = torch.ones(512)
    importance_I[:64] = 0
    scale = block_scale(weight_OI, spec, importance_I)
    packed = round_to_grid(weight_OI, Grid.stored_as(scale), spec)
    dead = (packed.dequantize() - weight_OI)[:, :64]
    assert dead.square().mean() < 0.02 * weight_OI[:, :64].square().mean()


def statistics(columns: int = 512) -> Statistics:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    hessian = Hessian(columns, torch.device("cpu"))
    hessian.add(torch.randn(2048, columns, generator=generator) @ (mixing + torch.eye(columns)))
    return Statistics(hessian)


@pytest.mark.parametrize("name", [*K_TYPES, "IQ4_NL"])
def test_feedback_and_refinement_lower_the_output_error(name: str) -> None:
    spec, stats, weight_OI = GGUF_TYPES[name], statistics(), weight()
    hessian_II = stats[Hessian].shrunk_II(0.0)

    def error(*steps: Rtn | Clip | Gptq | Refine) -> float:
        state = LinearState("m", weight_OI, spec, torch.float16)
        for step in steps:
            state = step.compress(state, stats)
        current = state.current
        assert isinstance(current, PackedFloat)
        assert current.spec == spec
        difference_OI = current.dequantize() - weight_OI
        return float(((difference_OI @ hessian_II) * difference_OI).sum())

    rounded = error(Clip(steps=6), Rtn())
    swept = error(Clip(steps=6), Gptq())
    refined = error(Clip(steps=6), Gptq(), Refine())
    assert swept < 0.95 * rounded
    assert refined < swept


def test_learned_grids_refuse_what_is_stored_together() -> None:
    state = LinearState("m", weight(), K_TYPES["Q4_K"], torch.float16)
    with pytest.raises(UnsupportedLayer, match="Q4_K is no grid"):
        LearnedGrid(state)


def test_a_spec_of_its_own() -> None:
    assert QuantSpec.parse(K_TYPES["Q4_K"].model_dump()) == K_TYPES["Q4_K"]
