"""The order of codes for the Triton products, and the PTX that unpacks them, without a GPU."""

import re

import pytest
import torch
from tests.unit.runtime.helpers import random_packed

from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.triton import ptx
from pocketlm.runtime.kernels.triton.kernel import TritonWeights, goes_wide, replayed
from pocketlm.runtime.kernels.triton.launches import DEFAULTS, Launch, launch_for, measured
from pocketlm.runtime.kernels.triton.layout import (
    lane_bits,
    pack_groups,
    pack_planes,
    unit_columns,
)

CASES = [
    # bits, rows, columns, group
    (2, 16, 256, 128),
    (2, 30, 192, 64),
    (2, 7, 96, 32),
    (3, 50, 256, 128),
    (3, 33, 192, 64),
    (3, 16, 96, 32),
    (4, 64, 256, 128),
    (4, 17, 96, 32),
    (4, 48, 576, 576),
    (5, 20, 128, 64),
    (8, 33, 160, 32),
    (4, 2100, 64, 64),  # packed in several parts
]


def unpack_planes(planes, width, unit, rows):
    """The signed codes that `pack_planes` put into order."""
    if width != 3:
        unsigned_OI = fields(planes[0], width, unit)
    else:
        unsigned_OI = fields(planes[0], 2, unit) + 4 * fields(planes[1], 1, unit)
    return (unsigned_OI[:rows] - (1 << (width - 1))).to(torch.int8)


def fields(plane, bits, unit):
    tiles, units = plane.shape[:2]
    shifts = torch.arange(16 // bits)[:, None] * bits + torch.tensor([0, 16])
    values = (plane[..., None, None] >> shifts) & ((1 << bits) - 1)
    ordered = values.view(tiles, units, 8, 4, unit // 16, 2, 2, 2)  # T C R L S K H P
    return ordered.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(tiles * 16, units * unit)


@pytest.mark.parametrize(("bits", "rows", "columns", "group"), CASES)
def test_codes_survive(bits, rows, columns, group):
    weight = random_packed(rows, columns, group, bits)
    width, unit = lane_bits(bits, group), unit_columns(lane_bits(bits, group), group)
    assert width >= bits
    assert group % unit == 0
    planes = pack_planes(weight.codes_OI, width, unit)
    tiles = -(-rows // 16)
    assert sum(plane.numel() * 32 for plane in planes) == tiles * 16 * columns * width
    assert torch.equal(unpack_planes(planes, width, unit, rows), weight.codes_OI)


@pytest.mark.parametrize(("width", "unit"), [(2, 128), (2, 32), (4, 64), (4, 32), (8, 32)])
def test_a_lane_holds_its_own_part_of_operand_a(width, unit):
    """mma.m16n8k16, operand A (PTX ISA): register 2 k + h of lane 4 r + l is the pair of columns
    2 l, 2 l + 1 (+ 8 for k = 1) of row r (+ 8 for h = 1), the even column in the low half.
    """
    codes_OI = torch.randint(-(1 << width - 1), 1 << width - 1, (16, unit), dtype=torch.int8)
    (plane,) = pack_planes(codes_OI, width, unit)
    fields = 16 // width
    for lane in range(32):
        r, pair = divmod(lane, 4)
        for register in range(unit // 4):  # of all steps of 16 columns, 4 each
            step, k, h = register // 4, register // 2 % 2, register % 2
            word = int(plane[0, 0, lane, register // fields]) & 0xFFFFFFFF
            for p in (0, 1):
                shift = register % fields * width + 16 * p
                code = (word >> shift & (1 << width) - 1) - (1 << width - 1)
                assert code == codes_OI[r + 8 * h, 16 * step + 8 * k + 2 * pair + p]


def test_scales_lie_by_tile_and_group():
    scale_OG = torch.randn(20, 3)
    packed = pack_groups(scale_OG)
    assert packed.shape == (2, 3, 16)
    assert packed[1, 2, 3] == scale_OG[19, 2]
    assert packed[1, 2, 4] == 0


def test_whole_tiles_of_rows_can_be_joined_after_packing():
    upper, lower = random_packed(32, 256, 128, 3), random_packed(48, 256, 128, 3)
    codes_OI = torch.cat([upper.codes_OI, lower.codes_OI])
    parts = [pack_planes(weight.codes_OI, 3, 128) for weight in (upper, lower)]
    for whole, *both in zip(pack_planes(codes_OI, 3, 128), *parts, strict=True):
        assert torch.equal(whole, torch.cat(both))
    scale_OG = torch.cat([upper.scale_OG, lower.scale_OG])
    both = [pack_groups(weight.scale_OG) for weight in (upper, lower)]
    assert torch.equal(pack_groups(scale_OG), torch.cat(both))


def float_pair(word, kind):
    halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16)
    dtype = torch.bfloat16 if kind == ptx.BF16 else torch.float16
    return halves.view(dtype)


def word_of(pair):
    low, high = (int(half) & 0xFFFF for half in pair.view(torch.int16))
    return low | high << 16


def execute(text, kind, registers):
    """Runs the few instructions that ptx.py writes."""
    values = dict(registers)

    def read(name):
        return int(name, 16) if name.startswith("0x") else values[name]

    for operation, operands in re.findall(r"([a-z][\w.]+) ([^;{}]+);", text):
        if operation == "reg":  # a declaration
            continue
        to, *sources = (operand.strip() for operand in operands.split(","))
        if operation == "mov.b32":
            values[to] = read(sources[0])
        elif operation in ("shr.u32", "shl.b32"):
            word, bits = read(sources[0]), int(sources[1])
            shifted = word >> bits if operation == "shr.u32" else word << bits
            values[to] = shifted & 0xFFFFFFFF
        elif operation == "lop3.b32":
            a, b, c = (read(source) for source in sources[:3])
            table = int(sources[3], 16)
            bits = [table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1
                    for i in range(32)]  # fmt: skip
            values[to] = sum(bit << i for i, bit in enumerate(bits))
        else:
            assert operation == f"fma.rn.{kind}"
            a, b, c = (float_pair(read(source), kind).double() for source in sources)
            dtype = float_pair(0, kind).dtype
            values[to] = word_of((a * b + c).to(dtype))  # one rounding: exact in float64
    return values


@pytest.mark.parametrize("kind", ptx.KINDS)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_ptx_unpacks_every_field_exactly(width, kind):
    count, half = 16 // width, 1 << (width - 1)
    text = ptx.low(kind, width) if width < 8 else ptx.eight(kind)
    for base in range(0, 1 << width, 3):  # every code in every field, others all different
        fields = [(base + 5 * i) % (1 << width) for i in range(2 * count)]
        word = sum(u << (width * (i % count) + 16 * (i // count)) for i, u in enumerate(fields))
        values = execute(text, kind, {f"${count}": word})
        for i in range(count):
            low, high = float_pair(values[f"${i}"], kind).tolist()
            assert (low, high) == (fields[i] - half, fields[count + i] - half)


@pytest.mark.parametrize("kind", ptx.KINDS)
@pytest.mark.parametrize("parity", [0, 1])
def test_ptx_puts_the_planes_of_three_bits_together(parity, kind):
    for seed in range(8):
        u = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
        low = sum((c & 3) << (2 * (i % 8) + 16 * (i // 8)) for i, c in enumerate(u))
        high = sum((c >> 2) << (i % 8 + 8 * parity + 16 * (i // 8)) for i, c in enumerate(u))
        other = 0xFF00FF00 if parity == 0 else 0x00FF00FF  # belongs to another word of low bits
        values = execute(
            ptx.three(kind, parity), kind, {"$8": low, "$9": high | other & 0xA5A5A5A5}
        )
        for i in range(8):
            pair = float_pair(values[f"${i}"], kind).tolist()
            assert pair == [u[i] - 4, u[8 + i] - 4]


@pytest.mark.parametrize("kind", ptx.KINDS)
def test_ptx_scales_as_dequantize_does(kind):
    dtype = float_pair(0, kind).dtype
    v, z = torch.tensor([-8, 7]).to(dtype), torch.tensor([3, -5]).to(dtype)
    s = torch.tensor([0.0371, -0.212]).to(dtype)
    registers = {"$1": word_of(v), "$2": word_of(s), "$3": word_of(z)}
    plain = execute(ptx.scale(kind, zeros=False), kind, registers)
    shifted = execute(ptx.scale(kind, zeros=True), kind, registers)
    assert torch.equal(float_pair(plain["$0"], kind), v * s)
    assert torch.equal(float_pair(shifted["$0"], kind), (v - z) * s)


def test_what_the_kernel_refuses():
    kernel = TritonWeights()
    cuda = torch.device("cuda", 0)
    cpu = kernel.refuses(Grid(64, 128, 4, 32, True), torch.bfloat16, torch.device("cpu"))
    assert "on CUDA" in cpu
    assert "float16" in kernel.refuses(Grid(64, 128, 4, 32, True), torch.float32, cuda)
    assert "groups of 16" in kernel.refuses(Grid(64, 128, 4, 16, True), torch.bfloat16, cuda)


def test_steps_are_whole_units_of_groups_and_rows():
    few, many = Launch("decode", columns=128), Launch("prefill", columns=128)
    assert few.units(unit=64, group_size=128, columns=4096) == 2
    assert few.units(unit=32, group_size=128, columns=4096) == 4
    assert few.units(unit=64, group_size=64, columns=4096) == 1
    assert few.units(unit=128, group_size=128, columns=4096) == 1
    assert few.units(unit=32, group_size=96, columns=4224) == 1
    assert many.units(unit=64, group_size=576, columns=576) == 1
    assert Launch("prefill", columns=64).units(unit=128, group_size=128, columns=4096) == 1


def test_launches_are_those_of_the_nearest_measured_case():
    rows = measured()["NVIDIA H200"]
    assert measured()["NVIDIA H100 80GB HBM3"]
    for row in rows:
        found = launch_for("NVIDIA H200", row.width, row.rows, row.columns, row.activations)
        assert found == row.launch
    few = next(r for r in rows if (r.width, r.rows, r.activations) == (4, 4096, 8))
    assert launch_for("NVIDIA H200", 4, 4000, few.columns, 5) == few.launch
    most = [row for row in rows if row.activations == max(r.activations for r in rows)]
    assert launch_for("NVIDIA H200", 4, 14336, 4096, 10**6) in [row.launch for row in most]
    assert launch_for("NVIDIA H200", 3, 14336, 4096, 64).product == "prefill"  # of 4 bits


def test_an_unknown_device_gets_a_default():
    assert launch_for("A card of 2031", 4, 4096, 4096, 1) == DEFAULTS[4]
    assert launch_for("A card of 2031", 4, 4096, 4096, 17) == DEFAULTS[32]
    assert launch_for("A card of 2031", 4, 4096, 4096, 10**6) == DEFAULTS[max(DEFAULTS)]


@pytest.mark.parametrize(
    ("bits", "group", "columns", "activations", "wide"),
    [
        (4, 128, 8192, 1024, True),
        (4, 128, 8192, 64, False),  # over before the host has launched the next
        (4, 32, 8192, 1024, False),  # steps of 64 columns make up no group
        (3, 128, 8192, 1024, False),
        (4, 64, 8256, 1024, False),  # an odd number of steps in a row
    ],
)
def test_what_the_product_of_very_many_rows_takes(bits, group, columns, activations, wide):
    assert goes_wide(Grid(32768, columns, bits, group, True), activations) is wide


def test_a_product_in_a_graph_is_never_too_small_for_tensor_maps():
    small = Grid(256, 256, 4, 128, True)
    with replayed():
        assert goes_wide(small, 300)
        assert not goes_wide(Grid(256, 256, 3, 128, True), 300)
    assert not goes_wide(small, 300)
