"""Every kernel against the definition: PackedInt.dequantize() in float64."""

import logging

import pytest
import torch
from tests.unit.runtime.helpers import random_packed

from pocketlm.runtime.kernels import base, reference
from pocketlm.runtime.kernels.bags import Bags
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.cpu import Int4Cpu, Int8Cpu
from pocketlm.runtime.kernels.reference import Reference
from pocketlm.runtime.kernels.select import TABLE, announce, kernel_for
from pocketlm.runtime.linear import PackedLinear

CPU = torch.device("cpu")
# Relative error of the product against float64. A half dtype rounds decoded weights (reference
# only) and results; scales are exact in bfloat16 here.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(64, 128, 32), (50, 96, 16), (208, 192, 64), (304, 576, None), (1000, 320, 64)]


def error(kernel, weight, dtype, rows, tiles):
    grid = Grid.of(weight)
    x_MI = torch.randn(rows, grid.columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    buffers = kernel.pack(weight, dtype, CPU)
    y_MO = (kernel.matmul_tiles if tiles else kernel.matmul)(x_MI, buffers, grid)
    assert y_MO.dtype is dtype
    truth_MO = x_MI.double() @ weight.dequantize(torch.float64).T
    assert y_MO.shape == truth_MO.shape
    return float((y_MO.double() - truth_MO).norm() / truth_MO.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "kernel", [Reference(), Bags(), Int4Cpu(), Int8Cpu()], ids=lambda k: k.name
)
def test_equals_definition(kernel, bits, symmetric):
    tried = 0
    for rows, columns, group in SHAPES:
        weight = random_packed(rows, columns, group, bits, symmetric)
        for dtype, tolerance in TOLERANCE.items():
            if kernel.refuses(Grid.of(weight), dtype, CPU) is not None:
                continue
            for tokens, tiles in ((1, False), (5, False), (3, True)):
                found = error(kernel, weight, dtype, tokens, tiles)
                assert found < tolerance, (rows, columns, group, dtype, tokens, tiles, found)
                tried += 1
    wide = bits > 4 or isinstance(kernel, Reference | Bags)
    narrow = bits <= 4 or not isinstance(kernel, Int4Cpu)
    assert bool(tried) == (wide and narrow) or isinstance(kernel, Int4Cpu | Int8Cpu)


def test_int4_is_tried_where_it_should_be():
    assert Int4Cpu().refuses(Grid(64, 128, 4, 32, True), torch.bfloat16, CPU) is None
    assert Int8Cpu().refuses(Grid(64, 128, 8, 128, True), torch.bfloat16, CPU) is None
    for grid in (Grid(65, 128, 4, 32, True), Grid(64, 96, 4, 16, True), Grid(64, 64, 5, 64, True)):
        assert Int4Cpu().refuses(grid, torch.bfloat16, CPU) is not None


def test_reference_equals_dequantize_in_small_tiles(monkeypatch):
    monkeypatch.setattr(base, "TILE_BYTES", 3 * 96 * 4)
    weight = random_packed(50, 96, 32, 3, symmetric=False)
    x_MI = torch.randn(4, 96)
    buffers = Reference().pack(weight, torch.float32, CPU)
    decoded = []
    real = Reference.decode

    def counting(self, buffers, grid, start, stop):
        tile = real(self, buffers, grid, start, stop)
        decoded.append(tile.codes_OI.shape[0])
        return tile

    monkeypatch.setattr(reference.Reference, "decode", counting)
    y_MO = Reference().matmul(x_MI, buffers, Grid.of(weight))
    assert max(decoded) == 3
    assert sum(decoded) == 50
    torch.testing.assert_close(y_MO, x_MI @ weight.dequantize().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_dequantised_copy(dtype, symmetric):
    weight = random_packed(512, 1024, 64, 4, symmetric)
    linear = PackedLinear(weight, dtype=dtype)
    linear(torch.randn(1, 1024).to(dtype))
    linear(torch.randn(300, 1024).to(dtype))
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    held += sum(p.numel() * p.element_size() for p in linear.parameters())
    assert held == linear.packed_bytes < 0.35 * 2 * 512 * 1024


def test_thresholds_change_no_result():
    weight = random_packed(96, 128, 32, 4, symmetric=False)
    for dtype in (torch.float32, torch.bfloat16):
        linear = PackedLinear(weight, torch.randn(96), dtype=dtype)
        at = linear.choice.tiles_from
        assert at is not None
        x_MI = torch.randn(at, 128).to(dtype)
        tiles_MO, few_MO = linear(x_MI)[: at - 1], linear(x_MI[: at - 1])
        assert (tiles_MO - few_MO).norm() < TOLERANCE[dtype] * few_MO.norm()


def test_shapes_bias_and_no_tokens():
    weight, bias = random_packed(64, 128, 64, 4), torch.randn(64)
    linear = PackedLinear(weight, bias)
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(
        linear(x), torch.nn.functional.linear(x, weight.dequantize(), bias), rtol=1e-4, atol=1e-3
    )
    assert linear(x[:, :0]).shape == (2, 0, 64)


def test_table_ends_with_a_kernel_for_everything():
    assert TABLE[-1].kernel.name == "reference"
    for bits in range(2, 9):
        for dtype in TOLERANCE:
            for device in ("cpu", "meta"):
                assert kernel_for(Grid(7, 11, bits, 11, False), dtype, device).reason


def test_choice_names_who_was_passed_over_and_why():
    choice = kernel_for(Grid(64, 96, 4, 16, True), torch.bfloat16, "cpu")
    assert "groups of 16" in choice.refused["cpu-int4"]
    assert kernel_for(Grid(64, 128, 4, 32, True), torch.bfloat16, "cpu").kernel.name == "cpu-int4"
    assert kernel_for(Grid(64, 128, 4, 32, True), torch.float32, "cpu").kernel.name == "cpu-bags"


def test_fallback_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(Bags, "refuses", lambda *_: "is switched off in this test")
    weight = random_packed(32, 64, 32, 6)
    with caplog.at_level(logging.WARNING, "pocketlm.runtime"):
        for _ in range(3):
            linear = PackedLinear(weight)
    assert linear.choice.is_fallback
    said = [r for r in caplog.records if "switched off in this test" in r.getMessage()]
    assert len(said) == 1
    announce(kernel_for(Grid(32, 64, 6, 32, True), torch.float32), Grid(32, 64, 6, 32, True))


def test_a_kernel_with_wrong_numbers_is_not_trusted(monkeypatch):
    from pocketlm.runtime.kernels import select

    right = Bags.matmul
    monkeypatch.setattr(Bags, "matmul", lambda *args: right(*args) * 1.001)
    select._probe.cache_clear()
    try:
        choice = kernel_for(Grid(64, 128, 4, 32, True), torch.float32, "cpu")
    finally:
        select._probe.cache_clear()
    assert choice.kernel.name == "reference"
    assert "wrong numbers" in choice.refused["cpu-bags"]
