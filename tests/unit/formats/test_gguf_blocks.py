"""GGUF blocks: bit for bit what the gguf package reads and writes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import GGUF_TYPES, QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats.gguf_blocks import decode, encode
from pocketlm.formats.gguf_hold import holding_type, native
from pocketlm.formats.gguf_types import NUMBERS, SPECS, block_bytes, block_weights, row_bytes
from pocketlm.quant.grid import minmax_grid, round_to_grid, searched_grid

REFERENCE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def random_blocks(kind: str, rows: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    if kind == "TQ1_0":  # not every byte is five digits of base three
        values = rng.standard_normal((rows, 2 * 256)).astype(np.float32)
        return torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType.TQ1_0))
    data = rng.integers(0, 256, (rows, 2 * block_bytes(kind)), dtype=np.uint8)
    return torch.from_numpy(data)


@pytest.mark.parametrize("kind", SPECS)
def test_any_bytes_decode_as_the_package_decodes_them(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    assert NUMBERS[kind] == number
    assert gguf.constants.GGML_QUANT_SIZES[number] == (block_weights(kind), block_bytes(kind))
    data = random_blocks(kind)
    with np.errstate(all="ignore"):  # random bytes are no finite scales everywhere
        expected = gguf.quants.dequantize(data.numpy(), number)
    packed = decode(data, kind)
    np.testing.assert_array_equal(packed.dequantize().numpy(), expected)
    whole = np.isfinite(expected).all(1)  # a NaN has many spellings
    assert whole.any()
    assert torch.equal(encode(packed, kind)[whole], data[whole])


@pytest.mark.parametrize("kind", REFERENCE)
def test_what_the_package_writes_is_written_back(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    data = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(encode(decode(data, kind), kind), data)


def weight(rows: int = 16, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * 0.05


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_our_grids_survive_the_file(kind: str) -> None:
    spec = GGUF_TYPES[kind]
    packed = round_to_grid(weight(), searched_grid(weight(), spec, torch.float16, steps=2), spec)
    assert holding_type(spec, 512) == kind
    data = encode(packed, kind)
    assert data.shape == (16, row_bytes(kind, 512))
    assert torch.equal(decode(data, kind).dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("spec", "kind", "exact"),
    [
        (QuantSpec(bits=4, group_size=128), "Q4_0", True),
        (QuantSpec(bits=3, group_size=64), "Q4_0", True),
        (QuantSpec(bits=2, group_size=None), "TQ2_0", True),
        (QuantSpec(bits=6, group_size=32), "Q8_0", True),
        (QuantSpec(bits=3, symmetric=False, group_size=32), "Q4_0", True),
        (QuantSpec(bits=7, symmetric=False, group_size=32), "Q8_0", True),
        (QuantSpec(bits=4, symmetric=False, group_size=64), "Q4_1", False),
        (QuantSpec(bits=5, symmetric=False, group_size=32), "Q5_1", False),
    ],
)
def test_integers_in_the_type_that_holds_their_codes(
    spec: QuantSpec, kind: str, exact: bool
) -> None:
    packed = round_to_grid(weight(), minmax_grid(weight(), spec, torch.float16), spec)
    assert holding_type(spec, 512) == kind
    back = decode(encode(packed, kind), kind).dequantize()
    if exact:
        assert torch.equal(back, packed.dequantize())
    else:  # minima rounded to float16: far less than a step
        step = packed.scale_OG.float().repeat_interleave(packed.group_size, 1)
        moved = (back - packed.dequantize()).abs() / step
        assert 0 < moved.max() < 0.02


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=8, symmetric=False, group_size=32),
        QuantSpec(bits=4, group_size=16),
        QuantSpec(bits=4, type="nf", group_size=64),
        QuantSpec(bits=8, type="float", group_size=None),
    ],
)
def test_no_type_holds_these(spec: QuantSpec) -> None:
    assert holding_type(spec, 512) is None


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    scale = torch.ones(1, 1, dtype=torch.float16)
    zero = torch.full((1, 1), 7, dtype=torch.int8)
    with pytest.raises(ArtifactError, match="does not fit Q4_0"):
        encode(PackedInt(codes, scale, zero, 4), "Q4_0")
    with pytest.raises(ArtifactError, match="do not divide 40"):
        row_bytes("Q4_0", 40)


def test_native_formats() -> None:
    assert native(QuantSpec(bits=4, group_size=128)) == GGUF_TYPES["Q4_0"]
    assert native(QuantSpec(bits=5, symmetric=False, group_size=64)) == GGUF_TYPES["Q5_1"]
    kept = QuantSpec(bits=3, group_size=64)
    assert native(kept) == kept
