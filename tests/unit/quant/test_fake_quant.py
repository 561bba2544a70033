"""The differentiable grid: its start is the grid it comes from, its gradients are the formulas'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.reconstruct import Parameter
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.quant.fake_quant import FakeQuant, LearnedGrid, ends_of, start_grid
from pocketlm.quant.grid import grouped, round_to_grid, searched_grid
from pocketlm.quant.learned_clip import START, LearnedClip, unclipped_ends
from pocketlm.quant.rtn import Rtn

SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, group_size=group)
    for bits in (2, 3, 8)
    for symmetric in (True, False)
    for group in (16, None)
]


def linear(spec: QuantSpec, dtype: torch.dtype = torch.float16) -> LinearState:
    weight_OI = torch.randn(6, 48, generator=torch.Generator().manual_seed(3))
    weight_OI[2, 5:30] *= 7
    weight_OI[4] = 0.0
    return LinearState("x", weight_OI, spec, dtype)


def plain(w: Tensor, v: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
    """The same by autograd: rounding is the identity backwards."""
    place = w / s + v + z
    rounded = place + (place.round() - place).detach()
    return s * (rounded.clamp(low, high) - z)


@pytest.mark.parametrize("with_zero", [True, False])
def test_gradients_are_those_of_straight_through_rounding(with_zero: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, v = draw(3, 2, 8), (0.3 * draw(3, 2, 8)).requires_grad_()
    s = (0.2 * draw(3, 2, 1)).requires_grad_()  # of either sign; some weights lie beyond the codes
    z = draw(3, 2, 1).round().requires_grad_() if with_zero else None
    g = draw(3, 2, 8)
    ours = FakeQuant.apply(w, v, s, z, -4, 3)
    theirs = plain(w, v, s, torch.zeros_like(s) if z is None else z, -4, 3)
    assert torch.allclose(ours, theirs)
    learned = [x for x in (v, s, z) if x is not None]
    expected = torch.autograd.grad(theirs, learned, g)
    for mine, wanted in zip(torch.autograd.grad(ours, learned, g), expected, strict=True):
        assert torch.allclose(mine, wanted)
        assert bool(wanted.abs().sum() > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("searched", [True, False])
def test_it_starts_on_the_grid_it_is_given(
    spec: QuantSpec, dtype: torch.dtype, searched: bool
) -> None:
    state = linear(spec, dtype)
    if searched:
        grid = searched_grid(state.reference_OI, spec, dtype, smallest=0.3, steps=10)
        state = state.with_current(round_to_grid(state.reference_OI, grid, spec))
    grid = start_grid(state)
    ends = ends_of(grid, state)
    multipliers = [Parameter(torch.ones_like(end), 0.0) for end in ends]
    learner = LearnedGrid(state, ends, multipliers)
    nearest = round_to_grid(state.reference_OI, grid, spec)
    assert torch.equal(learner.weight_OI(), nearest.dequantize())
    assert torch.equal(learner.packed().scale_OG, nearest.scale_OG)
    assert torch.equal(learner.packed().codes_OI, nearest.codes_OI)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_kept_decodes_to_what_was_learned(spec: QuantSpec) -> None:
    state = linear(spec)
    generator = torch.Generator().manual_seed(4)
    ends = ends_of(start_grid(state), state)
    multipliers = [
        Parameter(0.6 + 0.8 * torch.rand(end.shape, generator=generator), 0.0) for end in ends
    ]
    offsets_OGi = torch.rand(grouped(state.reference_OI, spec).shape, generator=generator) - 0.5
    learner = LearnedGrid(state, ends, multipliers, Parameter(offsets_OGi, 0.0))
    packed = learner.packed()
    assert torch.equal(packed.dequantize(), learner.weight_OI())
    assert packed.scale_OG.dtype == torch.float16
    assert not torch.equal(packed.codes_OI, Rtn().compress(state, Statistics()).current.codes_OI)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_unclipped_ends_reach_every_weight(spec: QuantSpec) -> None:
    state = linear(spec, torch.float32)
    grid = start_grid(state)
    if spec.symmetric:  # some groups by the other sign
        grid.scale_OG[::2] *= -1
    learner = LearnedGrid(state, unclipped_ends(grid, state))
    error_OGi = grouped(learner.weight_OI() - state.reference_OI, spec).abs()
    scale_OG1 = learner.packed().scale_OG.abs()[:, :, None]
    slack = 1.0 if not spec.symmetric else 0.5  # a rounded zero point shifts both ends
    assert bool((error_OGi <= (slack + 1e-4) * scale_OG1).all())


def test_learned_clip_starts_at_the_earlier_grid_or_nearly_at_min_max() -> None:
    state = linear(QuantSpec(bits=3, group_size=16))
    first = LearnedClip()._learner(state).parameters[0].values
    assert bool((first == START).any())
    grid = searched_grid(state.reference_OI, state.spec, torch.float16, smallest=0.3, steps=20)
    searched = state.with_current(round_to_grid(state.reference_OI, grid, state.spec))
    scale_OG = LearnedClip()._learner(searched).packed().scale_OG
    unclipped = grid.scale_OG.abs() > 0.97 * unclipped_ends(grid, state)[0].abs()
    assert torch.allclose(scale_OG[~unclipped], grid.scale_OG[~unclipped], rtol=2e-3)
    assert bool((scale_OG.sign() == grid.scale_OG.sign())[grid.scale_OG.abs() > 1e-6].all())
