"""The differentiable grid: its start is the grid it comes from, its gradients are the formulas'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.levels import level_ends
from pocketlm.core.reconstruct import Parameter
from pocketlm.core.spec import SCHEMES, QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.quant.fake_quant import FakeQuant, LearnedGrid, ends_of
from pocketlm.quant.grid import grid_of, grouped, round_to_grid, searched_grid, ungrouped
from pocketlm.quant.learned_clip import START, LearnedClip, unclipped_ends
from pocketlm.quant.rtn import Rtn

COLUMNS = 192  # no multiple of a block of 128
INTEGERS = {
    f"{'sym' if symmetric else 'asym'}{bits}-{group}": QuantSpec(
        bits=bits, symmetric=symmetric, group_size=group
    )
    for bits in (2, 3, 8)
    for symmetric in (True, False)
    for group in (16, None)
}
FLOATS = {
    name: spec.fit(COLUMNS) for name, spec in SCHEMES.items() if spec.type not in ("int", "k")
}
SPECS = {**INTEGERS, **FLOATS}
LEARNED = {name: spec for name, spec in SPECS.items() if spec.scale != "dynamic8"}


def linear(spec: QuantSpec, dtype: torch.dtype = torch.float16) -> LinearState:
    weight_OI = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(3))
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
    ours = FakeQuant.apply(w, v, s, z, QuantSpec(bits=3))
    theirs = plain(w, v, s, torch.zeros_like(s) if z is None else z, -4, 3)
    assert torch.allclose(ours, theirs)
    learned = [x for x in (v, s, z) if x is not None]
    expected = torch.autograd.grad(theirs, learned, g)
    for mine, wanted in zip(torch.autograd.grad(ours, learned, g), expected, strict=True):
        assert torch.allclose(mine, wanted)
        assert bool(wanted.abs().sum() > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize("searched", [True, False])
def test_it_starts_on_the_grid_it_is_given(
    spec: QuantSpec, dtype: torch.dtype, searched: bool
) -> None:
    state = linear(spec, dtype)
    if searched:
        grid = searched_grid(state.reference_OI, spec, dtype, smallest=0.3, steps=10)
        state = state.with_current(round_to_grid(state.reference_OI, grid, spec))
    grid = grid_of(state)
    ends = ends_of(grid, state.spec)
    multipliers = [Parameter(torch.ones_like(end), 0.0) for end in ends]
    learner = LearnedGrid(state, multipliers=multipliers)
    nearest = round_to_grid(state.reference_OI, grid, spec)
    assert torch.equal(learner.weight_OI(), nearest.dequantize())
    assert torch.equal(learner.packed().codes_OI, nearest.codes_OI)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_kept_decodes_to_what_was_learned(spec: QuantSpec) -> None:
    state = linear(spec)
    generator = torch.Generator().manual_seed(4)
    multipliers = []
    if spec.scale != "dynamic8":
        ends = ends_of(grid_of(state), spec)
        multipliers = [
            Parameter(0.6 + 0.8 * torch.rand(end.shape, generator=generator), 0.0) for end in ends
        ]
    offsets_RGn = torch.rand(grouped(state.reference_OI, spec).shape, generator=generator) - 0.5
    learner = LearnedGrid(state, None, multipliers, Parameter(offsets_RGn, 0.0))
    packed = learner.packed()
    assert packed.is_finite
    assert packed.stored_bits == spec.stored_bits(state.reference_OI.shape)
    assert torch.equal(packed.dequantize(), learner.weight_OI())
    assert not torch.equal(packed.codes_OI, Rtn().compress(state, Statistics()).current.codes_OI)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.symmetric])
def test_half_a_gap_reaches_the_levels_on_both_sides(name: str) -> None:
    spec = SPECS[name]
    state = linear(spec)
    reached = []
    for offset in (-0.501, 0.501):
        offsets_RGn = torch.full_like(grouped(state.reference_OI, spec), offset)
        learner = LearnedGrid(state, offsets=Parameter(offsets_RGn, 0.0))
        reached.append(learner.weight_OI())
    below_OI, above_OI = torch.minimum(*reached), torch.maximum(*reached)  # scales of either sign
    scale_RG1 = learner._grid()[1][:, :, None]
    place_OI = ungrouped(
        grouped(state.reference_OI, spec) / scale_RG1, state.reference_OI.shape, spec
    )
    low, high = level_ends(spec)
    inside_OI = (place_OI > 0.9 * low) & (place_OI < 0.9 * high)
    assert float(inside_OI.float().mean()) > 0.5
    assert bool((below_OI <= state.reference_OI)[inside_OI].all())
    assert bool((above_OI >= state.reference_OI)[inside_OI].all())


@pytest.mark.parametrize("spec", LEARNED.values(), ids=LEARNED)
def test_unclipped_ends_reach_every_weight(spec: QuantSpec) -> None:
    state = linear(spec, torch.float32)
    grid = grid_of(state)
    if spec.type == "int" and spec.symmetric:  # some groups by the other sign
        grid.scale_OG[::2] *= -1
    learner = LearnedGrid(state, unclipped_ends(grid, state))
    _, scale_RG, zero_RG = learner._grid()
    place_RGn = grouped(state.reference_OI, spec) / scale_RG[:, :, None]
    if zero_RG is not None:
        place_RGn = place_RGn + zero_RG[:, :, None]
    low, high = level_ends(spec)
    # A rounded zero point shifts both ends; scales of few bits have a rounding of their own.
    slack = {"e8m0": 0.5, "e4m3": 0.07, "float": 0.002}[spec.scale] * high
    slack += 0.0 if zero_RG is None else 0.51
    assert low - slack <= float(place_RGn.min())
    assert float(place_RGn.max()) <= high + slack


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
