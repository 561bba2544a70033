"""Levels and scales: tables, nearest level, codes there and back, constants of the scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from pocketlm.core.levels import (
    codes_of,
    largest_level,
    level_ends,
    level_gap,
    levels_of,
    mirrored,
    rounder,
)
from pocketlm.core.scales import (
    Scale,
    dynamic_map,
    rounded_scale,
    scale_for,
    stored,
    tensor_divisor,
)
from pocketlm.core.spec import SCHEMES, QuantSpec

ONE = torch.ones(())
NUMBERS = ("W3A16", "W8A16", "MXFP4", "FP8_CHANNEL", "NF2", "NF3", "NF4", "FP4")
finite = st.floats(-2000, 2000, width=32, allow_nan=False)


def all_levels(spec: QuantSpec) -> torch.Tensor:
    """Every level, from every code."""
    if spec.type == "int":
        return torch.arange(spec.code_min, spec.code_max + 1).float()
    codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
    levels = levels_of(codes, spec)
    return levels[torch.isfinite(levels)]


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=40), small=st.booleans())
def test_nearest_is_nearest(name: str, values: list[float], small: bool) -> None:
    spec = SCHEMES[name]
    x = torch.tensor(values) / (1000 if small else 1)
    level = rounder(spec)(x, ONE, None)
    known = all_levels(spec)
    assert torch.isin(level, known).all()
    inside = x.clamp(float(known.min()), float(known.max()))
    best = (inside.double()[:, None] - known.double()).abs().amin(1)
    # A table is met through a midpoint rounded to float32.
    assert ((level.double() - inside.double()).abs() <= best + 1e-7).all()
    assert torch.equal(levels_of(codes_of(level, spec), spec), level)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_level_keeps_its_code(name: str) -> None:
    spec = SCHEMES[name]
    known = all_levels(spec)
    level = rounder(spec)(known.clone(), ONE, None)
    assert torch.equal(level, known)
    assert float(known.abs().max()) == largest_level(spec)
    assert mirrored(spec) == torch.equal(known.sort().values, (-known).sort().values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_are_quantiles(bits: int) -> None:
    """QLoRA, eq. 4, with the offset that keeps the ends finite and a zero in between."""
    count = 1 << bits
    offset = 1 - (1 / (count - 1) + 1 / count) / 4
    above = norm.ppf(np.linspace(offset, 0.5, count // 2 + 1)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, count // 2)[:-1])
    expected = np.sort([*below, 0.0, *above]) / above[0]
    assert all_levels(SCHEMES[f"NF{bits}"]).tolist() == pytest.approx(expected, abs=5e-7)


def test_ties_go_to_the_even_mantissa() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(rounder(SCHEMES["MXFP4"])(x, ONE, None), even)
    assert torch.equal(rounder(SCHEMES["MXFP4"])(-x, ONE, None), -even)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50))
def test_e4m3_is_torchs(values: list[float]) -> None:
    x = torch.tensor(values)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    level = rounder(SCHEMES["FP8_CHANNEL"])(x, ONE, None)
    assert torch.equal(level, expected.float())
    assert torch.equal(
        codes_of(level, SCHEMES["FP8_CHANNEL"]).view(torch.float8_e4m3fn).float(), expected.float()
    )


def test_integers_take_zero_points() -> None:
    spec = QuantSpec(bits=4, symmetric=False)
    zero = torch.tensor([3.0])
    x = torch.tensor([-40.0, -0.6, 0.0, 2.4, 90.0])
    level = rounder(spec)(x, ONE, zero)
    assert level.tolist() == [-11, -1, 0, 2, 4]
    codes = codes_of(level, spec, zero)
    assert codes.tolist() == [-8, 2, 3, 5, 7]
    assert torch.equal(levels_of(codes, spec, zero), level)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=20),
    st.sampled_from([4, 8]),
)
def test_mx_scale_reaches_the_largest_weight(values: list[float], bits: int) -> None:
    """What is rounded off a tile's largest weight is at most an eighth of it (E2M1's 7 → 6)."""
    spec = SCHEMES[f"MXFP{bits}"]
    absmax = torch.tensor(values)[:, None]
    scale = scale_for(absmax, spec, torch.float32)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (absmax / scale < largest_level(spec) * 7 / 6).all()
    assert (absmax / scale > largest_level(spec) / 2.4).all()
    assert torch.equal(stored(scale, spec, torch.float32).values_RG(), scale)


def test_mx_scales_stay_between_their_ends() -> None:
    spec = SCHEMES["MXFP4"]
    scale = scale_for(torch.tensor([[0.0, 1e-45, 3e38]]), spec, torch.float32)
    assert scale.tolist() == [[2.0**-127, 2.0**-127, 2.0**126]]
    assert rounded_scale(torch.tensor([[0.0, -1.0, 2.9]]), spec, torch.float32).tolist() == [
        [2.0**-127, 2.0**-127, 4.0]
    ]


def test_nvfp4_scales_fill_their_range() -> None:
    spec = SCHEMES["NVFP4"]
    absmax = torch.tensor([[6.0, 3.0, 1e-9, 0.0]])
    outer = tensor_divisor(absmax, spec)
    assert outer is not None
    assert outer.tolist() == [448.0]
    kept = stored(scale_for(absmax, spec, torch.bfloat16, outer), spec, torch.bfloat16, outer)
    assert kept.stored_RG.float().tolist() == [[448.0, 224.0, 2.0**-9, 2.0**-9]]
    assert kept.stored_bits == 4 * 8 + 32
    alone = tensor_divisor(torch.zeros(1), spec)
    assert alone is not None
    assert alone.tolist() == [1.0]


def test_the_dynamic_map_is_that_of_the_paper() -> None:
    table = dynamic_map()
    assert table.numel() == 256
    assert (table.diff() > 0).all()
    assert table[-1] == 1
    positive = table[table > 0][:-1]
    assert torch.equal(-positive.flip(0), table[table < 0])
    # 1, 2, 4 … 64 values a decade, from 10^-6 up.
    counts = torch.histc(positive.log10(), bins=7, min=-7, max=0)
    assert counts.tolist() == [1, 2, 4, 8, 16, 32, 64]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 1000))
def test_double_quantized_scales_are_close(rows: int, groups: int, seed: int) -> None:
    spec = SCHEMES["NF4_DQ"]
    values = torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) + 0.5
    kept = stored(values, spec, torch.bfloat16)
    assert kept.outer is not None
    assert kept.offset is not None
    blocks = -(-values.numel() // 256)
    assert kept.outer.shape == (blocks,)
    assert kept.stored_bits == 8 * values.numel() + 32 * (blocks + 1)
    widest = (values - values.mean()).abs().max()
    # The widest gap of the map is 0.9 / 64 of its end.
    assert ((kept.values_RG() - values).abs() <= widest * (0.9 / 64) * 0.51 + 1e-6).all()
    for start in range(rows):
        assert torch.equal(kept.rows(start, start + 1), kept.values_RG()[start : start + 1])


def test_scales_move_together() -> None:
    kept = Scale("e4m3", torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(1))
    moved = kept.map(torch.clone)
    assert moved.kind == "e4m3"
    assert len(moved.tensors) == 2
    assert torch.equal(moved.values_RG(), kept.values_RG())


@pytest.mark.parametrize("name", NUMBERS)
def test_gap_is_the_distance_of_the_levels_around(name: str) -> None:
    spec = SCHEMES[name]
    known = all_levels(spec).unique()
    low, high = level_ends(spec)
    assert (float(known[0]), float(known[-1])) == (low, high)
    middles = (known[:-1] + known[1:]) / 2
    assert torch.equal(level_gap(middles, spec), known.diff())
    beyond = torch.tensor([2 * low, 2 * high])
    assert torch.equal(level_gap(beyond, spec), known.diff()[[0, -1]])
