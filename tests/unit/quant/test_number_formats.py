"""Every method on every number format: errors, stored bits, grids that later steps keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.core.levels import levels_of
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import SCHEMES, QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import PackedFloat
from pocketlm.quant.clip import Clip
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.grid import Grid, grouped, minmax_grid, round_to_grid, searched_grid, ungrouped
from pocketlm.quant.refine import Refine, renewed_scales
from pocketlm.quant.rtn import Rtn

ROWS, COLUMNS = 150, 192  # neither divides into blocks of 128
# llama.cpp's formats have minima, and scales that hang together: test_block_grid.py
FLOATS = [name for name, spec in SCHEMES.items() if spec.type not in ("int", "k")]
SPECS = {name: SCHEMES[name].fit(COLUMNS) for name in FLOATS}
SPECS["FP8_GROUP"] = QuantSpec(type="float", bits=8, group_size=64)


@pytest.fixture(scope="module")
def weight_OI() -> Tensor:
    weight_OI = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * 0.02
    weight_OI[3, 7] = 0.3
    weight_OI[5] = 0
    return weight_OI


@pytest.fixture(scope="module")
def hessian() -> Hessian:
    generator = torch.Generator().manual_seed(1)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator)
    stat = Hessian(COLUMNS)
    stat.add(torch.randn(700, COLUMNS, generator=generator) @ mixing_II)
    return stat


@pytest.mark.parametrize("name", SPECS)
def test_methods_compose_and_lower_the_error(
    weight_OI: Tensor, hessian: Hessian, name: str
) -> None:
    spec = SPECS[name]
    start = LinearState("x", weight_OI, spec, torch.bfloat16)
    errors = []
    for steps in ((Rtn(),), (Clip(), Rtn()), (Gptq(),), (Gptq(), Refine())):
        state = start
        for step in steps:
            state = step.compress(state, Statistics(hessian))
        packed = state.current
        assert isinstance(packed, PackedFloat)
        assert packed.is_finite
        assert packed.stored_bits == spec.stored_bits((ROWS, COLUMNS))
        assert (packed.dequantize()[5].abs() < 1e-4).all()
        errors.append(relative_error(weight_OI, packed.dequantize(), hessian.matrix_II()))
    rounded, clipped, gptq, refined = errors
    assert clipped <= rounded * 1.001
    assert gptq < 0.7 * rounded
    assert refined < 0.95 * gptq
    assert rounded < {8: 0.002, 4: 0.05, 3: 0.15, 2: 0.4}[spec.bits]


@pytest.mark.parametrize("name", SPECS)
def test_codes_of_a_second_rounding_are_the_same(weight_OI: Tensor, name: str) -> None:
    """The decoded weight lies on its own grid, and the grid of an earlier step is kept."""
    spec = SPECS[name]
    first = round_to_grid(weight_OI, searched_grid(weight_OI, spec, torch.float16), spec)
    state = LinearState("x", first.dequantize(), spec, torch.float16, first)
    second = Rtn().compress(state, Statistics()).current
    assert isinstance(second, PackedFloat)
    assert torch.equal(second.dequantize(), first.dequantize())
    for ours, theirs in zip(second.scale.tensors, first.scale.tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", SPECS)
def test_search_never_loses(weight_OI: Tensor, name: str) -> None:
    spec = SPECS[name]
    importance_I = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) + 0.01
    errors = [
        (importance_I * (round_to_grid(weight_OI, g, spec).dequantize() - weight_OI).square()).sum()
        for g in (
            searched_grid(weight_OI, spec, torch.float16, importance_I),
            minmax_grid(weight_OI, spec, torch.float16),
        )
    ]
    slack = 1.02 if spec.scale == "dynamic8" else 1 + 1e-5  # its scales are rounded afterwards
    assert errors[0] <= errors[1] * slack


@pytest.mark.parametrize("name", SPECS)
def test_search_does_not_depend_on_how_rows_are_cut(
    weight_OI: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched_grid(weight_OI, SPECS[name], torch.float16, steps=4)
    monkeypatch.setattr("pocketlm.quant.grid.ROWS_AT_ONCE_BYTES", 7 * COLUMNS * 16)  # 7 rows
    cut = searched_grid(weight_OI, SPECS[name], torch.float16, steps=4)
    assert torch.equal(cut.scale_OG, whole.scale_OG)


@pytest.mark.parametrize("name", SPECS)
def test_tiles_go_there_and_back(weight_OI: Tensor, name: str) -> None:
    spec = SPECS[name]
    tiles_RGn = grouped(weight_OI, spec)
    assert tuple(tiles_RGn.shape[:2]) == spec.tiles((ROWS, COLUMNS))
    assert torch.equal(ungrouped(tiles_RGn, (ROWS, COLUMNS), spec), weight_OI)


@pytest.mark.parametrize("name", SPECS)
def test_rows_decode_alone(weight_OI: Tensor, name: str) -> None:
    spec = SPECS[name]
    packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.bfloat16), spec)
    assert isinstance(packed, PackedFloat)
    whole_OI = packed.dequantize()
    for start, stop in ((0, 1), (100, 140), (127, 129), (149, 300)):
        assert torch.equal(packed.rows(start, stop), whole_OI[start:stop])
    assert torch.equal(packed.dequantize(torch.bfloat16), whole_OI.bfloat16())
    scale_IO, _ = Grid.of(packed).by_column((ROWS, COLUMNS), spec)
    assert torch.equal(levels_of(packed.codes_OI, spec) * scale_IO.T, whole_OI)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_renewed_scales_of_eight_bits_never_raise_the_error(
    weight_OI: Tensor, hessian: Hessian, name: str
) -> None:
    spec, hessian_II = SPECS[name], hessian.matrix_II()
    packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.bfloat16), spec)
    new = renewed_scales(weight_OI, packed, hessian_II, spec)
    assert isinstance(packed, PackedFloat)
    assert isinstance(new, PackedFloat)
    assert torch.equal(new.codes_OI, packed.codes_OI)
    lost = [weight_OI - p.dequantize() for p in (packed, new)]
    before_O, after_O = (((e @ hessian_II) * e).sum(1) for e in lost)
    assert (after_O <= before_O * (1 + 1e-5)).all()
    assert after_O.sum() < (0.95 if name == "NVFP4" else 1.001) * before_O.sum()


@pytest.mark.parametrize("name", ["FP8_TENSOR", "FP8_BLOCK", "NF4_DQ"])
def test_scales_that_hang_together_stay(weight_OI: Tensor, hessian: Hessian, name: str) -> None:
    spec = SPECS[name]
    packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.bfloat16), spec)
    assert renewed_scales(weight_OI, packed, hessian.matrix_II(), spec) is packed


def test_linears_may_share_the_constant_of_nvfp4(weight_OI: Tensor) -> None:
    spec = SPECS["NVFP4"]
    scales = [
        Rtn()
        .compress(LinearState("x", w, spec, torch.bfloat16, shared_absmax=0.3), Statistics())
        .current.scale.outer
        for w in (weight_OI, weight_OI[:64] / 4)
    ]
    assert torch.equal(scales[0], scales[1])
    assert float(scales[0]) == pytest.approx(448 * 6 / 0.3)
