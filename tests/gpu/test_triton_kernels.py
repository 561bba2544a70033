"""The Triton products against the definition in float64; run with ``pytest -m gpu tests/gpu``."""

import random

import pytest
import torch
from tests.unit.runtime.helpers import random_packed

from pocketlm.runtime.joined import joined
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.select import kernel_for
from pocketlm.runtime.kernels.triton import kernel
from pocketlm.runtime.kernels.triton.kernel import (
    TritonWeights,
    decode_product,
    expand,
    missing,
    prefill_product,
    wide_product,
)
from pocketlm.runtime.kernels.triton.launches import DEFAULTS, Launch, measured
from pocketlm.runtime.linear import PackedLinear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16)
# Of the product, relative: a result is rounded once; many rows also round weights (reference too).
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
WIDTHS = (2, 3, 4, 5, 6, 8)


@pytest.fixture(autouse=True)
def _device():
    """Who asks for these tests has a GPU: what does not work there is a failure, no skip."""
    assert missing() is None, missing()


def hopper():
    return torch.cuda.get_device_capability() == (9, 0)


def cases(count, seed, tokens):
    """Random shapes, groups, dtypes, numbers of rows, symmetric or not."""
    draw = random.Random(seed)
    for _ in range(count):
        group = draw.choice((32, 64, 96, 128, 256, None))
        columns = (group or 32) * draw.randint(1, 12)
        rows = draw.choice((1, 16, 40, 250, 528, 1000))
        yield rows, columns, group, draw.choice((True, False)), draw.choice(tokens)


def activations(tokens, columns, dtype, strided=False):
    width = columns + 24 if strided else columns
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(CUDA)[:, :columns]


def relative_error(y_MO, x_MI, weight):
    truth_MO = x_MI.cpu().double() @ weight.dequantize(torch.float64).T
    return float((y_MO.cpu().double() - truth_MO).norm() / truth_MO.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_few_rows_equal_the_definition(bits, dtype):
    for number, case in enumerate(cases(6, bits, (1, 2, 3, 8, 9, 16, 17, 32))):
        rows, columns, group, symmetric, tokens = case
        weight = random_packed(rows, columns, group, bits, symmetric)
        grid = Grid.of(weight)
        buffers = TritonWeights().pack(weight, dtype, CUDA)
        x_MI = activations(tokens, columns, dtype, strided=bool(number % 2))
        y_MO = decode_product(x_MI, buffers, grid, DEFAULTS[4], early=hopper())
        assert relative_error(y_MO, x_MI, weight) < TOLERANCE[dtype], case


@pytest.mark.parametrize(
    "launch",
    [
        Launch("decode", columns=64, warps=8),
        Launch("decode", row_tiles=2, early=False),
        Launch("decode", warps=8, ahead=4),
        Launch("decode", columns=64, row_tiles=4, shared=True),
        Launch("decode", row_tiles=4, shared=True),
        Launch("decode", warps=8, row_tiles=2, shared=True),
    ],
    ids=str,
)
def test_every_launch_of_few_rows(launch):
    for bits in (3, 4):
        for symmetric in (True, False):
            weight = random_packed(200, 2048, 128, bits, symmetric)
            grid, buffers = Grid.of(weight), TritonWeights().pack(weight, torch.bfloat16, CUDA)
            for tokens in (1, 7, 16):
                x_MI = activations(tokens, 2048, torch.bfloat16, strided=True)
                y_MO = decode_product(x_MI, buffers, grid, launch, early=hopper() and launch.early)
                assert relative_error(y_MO, x_MI, weight) < 8e-3, (bits, symmetric, tokens)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "launch",
    [
        Launch("decode", warps=8, resident=1),
        Launch("decode", ahead=2, resident=2),
        Launch("decode", warps=8, row_tiles=2, resident=1),
        Launch("decode", warps=8, shared=True, resident=1),
    ],
    ids=str,
)
def test_resident_programs_take_tiles_in_turn(launch, bits):
    for rows, columns, group, symmetric in ((9000, 512, 64, True), (4440, 1152, 128, False)):
        weight = random_packed(rows, columns, group, bits, symmetric)
        grid, buffers = Grid.of(weight), TritonWeights().pack(weight, torch.bfloat16, CUDA)
        for tokens in (1, 8):
            x_MI = activations(tokens, columns, torch.bfloat16)
            y_MO = decode_product(x_MI, buffers, grid, launch, early=hopper())
            assert relative_error(y_MO, x_MI, weight) < 8e-3, (rows, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_many_rows_equal_the_definition(bits, dtype):
    if not hopper():  # the kernel feeds its tensor cores; the table gives other cards another one
        pytest.skip("the product of many rows is of Hopper cards")
    launches = (
        Launch("prefill", tokens=16, splits=2),
        Launch("prefill", columns=64, tokens=64),
        Launch("prefill", tokens=128, warps=8),
        Launch("prefill", columns=64, tokens=256, warps=8),
        Launch("prefill", tokens=256, warps=8),  # of 8 bits more than shared memory holds
        Launch("prefill", columns=64, tokens=128, warps=8),
    )
    for number, case in enumerate(cases(6, 100 + bits, (5, 33, 64, 130, 300))):
        rows, columns, group, symmetric, tokens = case
        weight = random_packed(rows, columns, group, bits, symmetric)
        grid, buffers = Grid.of(weight), TritonWeights().pack(weight, dtype, CUDA)
        x_MI = activations(tokens, columns, dtype, strided=bool(number % 2))
        y_MO = prefill_product(x_MI, buffers, grid, launches[number])
        assert relative_error(y_MO, x_MI, weight) < TOLERANCE[dtype], case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_very_many_rows_equal_the_definition(bits, dtype):
    """Tiles shared by up to a dozen programs, by none, and ends that are no whole tile."""
    if not hopper():
        pytest.skip("the product of very many rows is of Hopper cards")
    launches = [Launch("wide", 64, 8, tokens=n, stages=5) for n in (128, 256)]
    shapes = (
        (250, 256, 64, 300),
        (528, 2048, 128, 513),
        (1000, 1536, 256, 130),
        (9000, 512, None, 257),
    )
    for number, (rows, columns, group, tokens) in enumerate(shapes):
        weight = random_packed(rows, columns, group, bits, symmetric=bool(number % 2))
        grid, buffers = Grid.of(weight), TritonWeights().pack(weight, dtype, CUDA)
        x_MI = activations(tokens, columns, dtype, strided=bool(number % 2))
        for launch in launches:
            y_MO = wide_product(x_MI, buffers, grid, launch)
            assert relative_error(y_MO, x_MI, weight) < TOLERANCE[dtype], (rows, launch)
            assert torch.equal(y_MO, wide_product(x_MI, buffers, grid, launch))


def test_what_is_not_wide_goes_another_way(monkeypatch):
    if not hopper():
        pytest.skip("the product of very many rows is of Hopper cards")
    monkeypatch.setattr(kernel, "WIDE_OPERATIONS", 0)  # else all of these are too small for it
    for bits, group, columns in ((4, 32, 512), (3, 128, 512), (4, 64, 576)):
        weight = random_packed(200, columns, group, bits)
        linear = PackedLinear(weight, dtype=torch.bfloat16, device=CUDA)
        x_MI = activations(600, columns, torch.bfloat16)
        assert relative_error(linear(x_MI), x_MI, weight) < 8e-3, (bits, group, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_expanded_rows_are_dequantized_ones(bits, dtype):
    for rows, columns, group, symmetric, _ in cases(3, 200 + bits, (1,)):
        weight = random_packed(rows, columns, group, bits, symmetric)
        buffers = TritonWeights().pack(weight, dtype, CUDA)
        found_OI = expand(buffers, Grid.of(weight), 0, rows, dtype)
        assert torch.equal(found_OI.cpu(), weight.dequantize(dtype))
        start = 16 if rows > 16 else 0
        part_OI = expand(buffers, Grid.of(weight), start, rows, dtype)
        assert torch.equal(part_OI, found_OI[start:])


def test_same_inputs_same_bits():
    weight = random_packed(512, 4096, 128, 4)
    linear = PackedLinear(weight, dtype=torch.bfloat16, device=CUDA)
    assert linear.choice.kernel.name == "triton"
    for tokens in (1, 5, 8, 16, 64, 300, 2100):
        x_MI = activations(tokens, 4096, torch.bfloat16)
        first = linear(x_MI)
        assert all(torch.equal(first, linear(x_MI)) for _ in range(5)), tokens


def test_numbers_of_rows_meet_without_a_seam():
    weight = random_packed(160, 512, 64, 4, symmetric=False)
    linear = PackedLinear(weight, torch.randn(160), dtype=torch.bfloat16, device=CUDA)
    x_MI = activations(1200, 512, torch.bfloat16)
    truth_MO = x_MI.double() @ weight.dequantize(torch.float64).T.to(CUDA) + linear.bias.double()
    for tokens in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 512, 513, 1023, 1024, 1200):
        y_MO = linear(x_MI[:tokens]).double()
        assert (y_MO - truth_MO[:tokens]).norm() < 8e-3 * truth_MO[:tokens].norm(), tokens


def test_replays_in_a_graph():
    weight = random_packed(256, 1024, 128, 4)
    linear = PackedLinear(weight, dtype=torch.bfloat16, device=CUDA)
    x_MI = activations(1, 1024, torch.bfloat16)
    linear(x_MI)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inner = linear(x_MI)
        y_MO = linear(torch.cat([inner] * 4, 1))  # reads what the product before it has made
    for seed in range(5):
        x_MI.copy_(torch.randn(1, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected_MO = linear(torch.cat([linear(x_MI)] * 4, 1))
        torch.cuda.synchronize()
        assert torch.equal(y_MO, expected_MO)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_joined_linears_are_the_single_ones(bits, symmetric):
    weights = [random_packed(rows, 1024, 128, bits, symmetric) for rows in (256, 64, 64)]
    singles = [PackedLinear(weight, dtype=torch.bfloat16, device=CUDA) for weight in weights]
    one = joined(singles)
    assert one is not None
    for tokens in (1, 12, 40):
        x_MI = activations(tokens, 1024, torch.bfloat16)
        apart = torch.cat([single(x_MI) for single in singles], -1)
        assert (one(x_MI) - apart).norm() < 8e-3 * apart.norm()


def test_no_copy_of_the_weight_stays():
    weight = random_packed(1024, 2048, 64, 4)
    linear = PackedLinear(weight, dtype=torch.bfloat16, device=CUDA)
    for tokens in (1, 100):
        x_MI = activations(tokens, 2048, torch.bfloat16)
        linear(x_MI)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear(x_MI)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert linear.packed_bytes < 0.27 * 2 * 1024 * 2048


def test_table_takes_it_where_it_runs():
    for bits in WIDTHS:
        for dtype in DTYPES:
            choice = kernel_for(Grid(64, 128, bits, 32, True), dtype, CUDA)
            assert choice.kernel.name == "triton", choice.refused
    assert all(row.seconds > 0 for rows in measured().values() for row in rows)
