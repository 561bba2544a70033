"""Floats on disk: bit-equal to what compressed-tensors makes of a weight, and read back alike."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.unit.formats.artifacts import (
    build_gpt2,
    build_llama,
    decoded_by_hand,
    round_to_nearest,
    write_artifact,
)
from tests.unit.formats.test_hf import load, same_logits
from torch import Tensor

import pocketlm.hf
from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.spec import SCHEMES, ActivationSpec, QuantSpec
from pocketlm.core.tensors import PackedFloat
from pocketlm.formats import compressed_tensors as form
from pocketlm.formats import pocketlm as own
from pocketlm.formats.inputs import input_args
from pocketlm.formats.read import CompressedIndex
from pocketlm.quant.grid import minmax_grid, round_to_grid

HELD = ["FP8_TENSOR", "FP8_CHANNEL", "FP8_BLOCK", "FP8_GROUP", "MXFP4", "MXFP8", "NVFP4"]
TABLES = ["NF2", "NF3", "NF4", "NF4_DQ", "FP4", "FP4_DQ"]
SPECS = {**SCHEMES, "FP8_GROUP": QuantSpec(type="float", bits=8, group_size=32)}


def extremes(weight_OI: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each tile, in the shape that the library gives its scales."""
    rows, columns = weight_OI.shape
    below, beside = spec.tiles((rows, columns))
    height, width = spec.group_rows or rows, spec.group_size or columns
    missing = (0, beside * width - columns, 0, below * height - rows)
    padded = torch.nn.functional.pad(weight_OI, missing)
    tiles = padded.view(below, height, beside, width)
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    return (low.view(1), high.view(1)) if spec.group_rows is None else (low, high)


def librarys(weight_OI: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """What compressed-tensors stores for a weight that it rounds itself."""
    args = QuantizationArgs.model_validate(form.weight_args(spec))
    name = form.storage(spec)
    low, high = extremes(weight_OI, spec)
    divisor = None
    if spec.scale == "e4m3":
        divisor = generate_gparam(weight_OI.amin(), weight_OI.amax())
    scale, _ = calculate_qparams(low, high, args, global_scale=divisor)
    state = {"weight": weight_OI, "weight_scale": scale}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    return BaseCompressor.get_value_from_registry(name).compress(state, scheme)


def librarys_weight(stored: dict[str, Tensor], spec: QuantSpec) -> Tensor:
    """What compressed-tensors decodes."""
    args = QuantizationArgs.model_validate(form.weight_args(spec))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form.storage(spec))
    compressor = BaseCompressor.get_value_from_registry(form.storage(spec))
    return compressor.decompress(dict(stored), scheme)["weight"]


def ours(weight_OI: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.float32), spec)
    return {k.removeprefix("m."): v for k, v in form.encode("m.weight", packed).items()}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for role, tensor in expected.items():
        assert found[role].dtype == tensor.dtype, role
        assert found[role].shape == tensor.shape, role
        assert torch.equal(found[role].view(torch.uint8), tensor.view(torch.uint8)), role


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("shape", [(48, 96), (150, 320)])
def test_rounding_to_nearest_is_the_librarys(name: str, shape: tuple[int, int]) -> None:
    spec = SPECS[name]
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight_OI = torch.randn(shape, generator=generator) * 10.0 ** (seed - 4)
        weight_OI[0, :32] = torch.randint(-12, 13, (32,), generator=generator) / 4.0  # ties
        if seed % 2:
            weight_OI = weight_OI.bfloat16().float()
        stored = ours(weight_OI, spec)
        require_equal(stored, librarys(weight_OI, spec))
        names = form.names("m.weight", spec)
        assert tuple(f"m.{role}" for role in stored) == names
        bytes_stored = sum(t.numel() * t.element_size() for t in stored.values())
        assert form.stored_bytes(spec, shape, torch.float32) == bytes_stored


# Scales below float32's normal numbers are not stored here (they are in the reference): a weight
# so small that its scale is one becomes a multiple of the smallest normal number instead.
finite = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False).filter(
    lambda value: value == 0 or abs(value) > 2.0**-80
)


@pytest.mark.parametrize("name", HELD)
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(finite, min_size=32, max_size=32),
    factor=st.sampled_from([1.0, 2.0**-8, 2.0**-16]),
)
def test_any_finite_weights_are_rounded_alike(
    name: str, values: list[float], factor: float
) -> None:
    """Decoded weights agree everywhere; stored tensors wherever a tile's scale is not too small.

    A tile whose weights are all (all but) zero gets the least scale here, an arbitrary one there.
    """
    spec = SPECS[name]
    weight_OI = torch.tensor([values, [v * factor for v in values]]) + 0.0  # no minus zero
    low, high = extremes(weight_OI, spec)
    largest_RG = torch.maximum(high, -low)
    if spec.scale == "e4m3" and largest_RG.amax() > 0:
        # The least E4M3 scale, half of it rounded up: smaller ones the library turns into 1/8.
        enough_RG = largest_RG / largest_RG.amax() * 448 > 2.0**-9
    else:
        enough_RG = largest_RG > 0
    if not bool(enough_RG.all()):
        return
    stored = ours(weight_OI, spec)
    expected = librarys(weight_OI.clone(), spec)
    require_equal(stored, expected)
    decoded = form.decode({f"m.{k}": v for k, v in stored.items()}, "m", spec).dequantize()
    theirs = librarys_weight(expected, spec)
    assert torch.equal(decoded.to(theirs.dtype), theirs)


@pytest.mark.parametrize("name", HELD)
def test_tiles_of_zeros_decode_to_zeros(name: str) -> None:
    stored = ours(torch.zeros(2, 64), SPECS[name])
    decoded = form.decode({f"m.{k}": v for k, v in stored.items()}, "m", SPECS[name])
    assert decoded.is_finite
    assert not decoded.dequantize().any()
    assert not librarys_weight(stored, SPECS[name]).any()


@pytest.mark.parametrize("name", [*HELD, *TABLES])
def test_our_own_format_holds_all(name: str) -> None:
    spec = SPECS[name].fit(96)
    torch.manual_seed(2)
    packed = round_to_nearest(torch.randn(40, 96), spec, torch.bfloat16)
    stored = own.encode("m.weight", packed)
    assert tuple(stored) == own.names("m.weight", spec)
    found = {k.removeprefix("m."): (tuple(t.shape), t.dtype) for k, t in stored.items()}
    assert found == own.parts(spec, (40, 96), torch.bfloat16)
    bytes_stored = sum(t.numel() * t.element_size() for t in stored.values())
    assert own.stored_bytes(spec, (40, 96), torch.bfloat16) == bytes_stored
    assert packed.stored_bits == 8 * bytes_stored
    again = own.decode(stored, "m", spec)
    assert isinstance(again, PackedFloat)
    assert isinstance(packed, PackedFloat)
    assert torch.equal(again.codes_OI, packed.codes_OI)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_integers_beside_integer_activations_are_not_packed() -> None:
    spec = QuantSpec(bits=8, group_size=None)
    torch.manual_seed(3)
    weight_OI = torch.randn(24, 64)
    packed = round_to_nearest(weight_OI, spec)
    inputs = ActivationSpec()
    stored = form.encode("m.weight", packed, InputQuantizer(inputs))
    assert list(stored) == ["m.weight", "m.weight_scale"]
    assert tuple(stored) == form.names("m.weight", spec, inputs)
    assert stored["m.weight"].dtype == torch.int8
    assert form.stored_bytes(spec, (24, 64), torch.float32, inputs) == 24 * 64 + 24 * 4
    assert torch.equal(form.decode(stored, "m", spec).dequantize(), packed.dequantize())
    args = QuantizationArgs.model_validate(form.weight_args(spec))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="int-quantized")
    state = {"weight": packed.dequantize(), "weight_scale": packed.scale_OG}
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    require_equal(
        {k.removeprefix("m."): v for k, v in stored.items()}, compressor.compress(state, scheme)
    )
    # 4 bits stay packed, whatever the activations are.
    assert form.storage(QuantSpec(bits=4), inputs) == "pack-quantized"


def test_groups_of_the_configuration_have_their_storage_and_inputs() -> None:
    inputs = ActivationSpec()
    specs = {
        "a.q_proj": QuantSpec(bits=8, group_size=None),
        "a.o_proj": QuantSpec(bits=8, group_size=None),
        "a.up_proj": SPECS["NVFP4"],
        "a.down_proj": SPECS["FP8_BLOCK"],
    }
    section = form.config_section(specs, [], {"a.q_proj": inputs})
    groups = list(section["config_groups"].values())
    assert section["format"] == "mixed-precision"
    assert [group["format"] for group in groups] == [
        "int-quantized", "pack-quantized", "nvfp4-pack-quantized", "float-quantized",
    ]  # fmt: skip
    assert [group["input_activations"] for group in groups] == [
        input_args(inputs),
        None,
        None,
        None,
    ]
    assert groups[3]["weights"]["block_structure"] == [128, 128]
    assert groups[2]["weights"]["scale_dtype"] == "torch.float8_e4m3fn"
    assert "dequantize" not in section
    alone = form.config_section({"a": SPECS["NVFP4"]}, [])
    assert alone["format"] == "nvfp4-pack-quantized"
    assert alone["dequantize"]
    assert "dequantize" not in form.config_section({"a": SPECS["FP8_TENSOR"]}, [])


def test_tables_have_no_place_in_compressed_tensors() -> None:
    with pytest.raises(UnsupportedLayer, match="m: compressed-tensors cannot hold NF4_DQ"):
        form.check(SPECS["NF4_DQ"], (64, 64), "transformers", where="m")
    own.check(SPECS["NF4_DQ"], (64, 64), "transformers", where="m")
    with pytest.raises(UnsupportedLayer, match="does not fill whole bytes"):
        own.check(QuantSpec(type="nf", group_size=None), (64, 33), "transformers")


@pytest.mark.parametrize(
    ("spec", "shape", "target", "said"),
    [
        (SPECS["FP8_GROUP"], (64, 128), "vllm", "does not run FP8_GROUP. It runs FP8_TENSOR"),
        (SPECS["NVFP4"], (64, 128), "vllm-cpu", "does not run NVFP4. It runs integers"),
        (SPECS["NVFP4"], (64, 40), "transformers", "groups of 16 do not divide 40 columns. Put"),
        (SPECS["FP8_BLOCK"], (64, 192), "vllm", "whole blocks of 128 x 128"),
        (SPECS["FP8_BLOCK"], (192, 256), "vllm", "this weight is 192 x 256"),
    ],
)
def test_what_a_target_does_not_run_is_refused(
    spec: QuantSpec, shape: tuple[int, int], target: str, said: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=rf"^l\.q_proj: .*{said}"):
        form.check(spec, shape, target, where="l.q_proj")
    form.check(SPECS["FP8_BLOCK"], (192, 256), "vllm", where="l.o_proj")


def test_damaged_tensors_are_refused() -> None:
    stored = form.encode("m.weight", round_to_nearest(torch.randn(8, 64), SPECS["NVFP4"]))
    with pytest.raises(ArtifactError, match=r"'m\.weight_global_scale' is missing"):
        form.decode({k: v for k, v in stored.items() if "global" not in k}, "m", SPECS["NVFP4"])
    with pytest.raises(ArtifactError, match="m: weight_scale is float8_e4m3fn"):
        form.decode(stored, "m", SPECS["MXFP4"])
    with pytest.raises(ArtifactError, match="m: weight is float32"):
        form.decode({"m.weight": torch.zeros(4, 64)}, "m", SPECS["FP8_CHANNEL"])
    packed = round_to_nearest(torch.randn(8, 64), SPECS["FP8_CHANNEL"])
    assert isinstance(packed, PackedFloat)
    packed.scale.stored_RG[0] = math.inf
    with pytest.raises(ArtifactError, match="m: a scale is not finite"):
        form.encode("m.weight", packed)


def test_a_configuration_of_another_number_format_is_refused() -> None:
    section = form.config_section({"a": SPECS["NVFP4"]}, [])
    stored = ("a.weight_packed", "a.weight_scale", "a.weight_global_scale")
    assert CompressedIndex.build({"quantization_config": section}, stored) is not None
    section["config_groups"]["group_0"]["weights"] |= {"group_size": 32}
    with pytest.raises(UnsupportedModel, match="weights are 'float' per 'tensor_group'"):
        CompressedIndex.build({"quantization_config": section}, stored)


@pytest.mark.parametrize("name", [*HELD, *TABLES])
def test_what_was_written_is_read(tmp_path: Path, name: str) -> None:
    kind = "compressed-tensors" if name in HELD else "pocketlm"

    def choose(module: str) -> QuantSpec | None:
        return None if "o_proj" in module else SPECS[name].fit(160 if "down" in module else 64)

    path, packed = write_artifact(tmp_path / "out", build_llama(), choose, kind)
    stored = load_file(path / "model.safetensors")
    index = CompressedIndex.build(json.loads((path / "config.json").read_text()), stored)
    assert index is not None
    assert index.modules.keys() == packed.keys()
    for module, expected in packed.items():
        found = index.decode(module, stored.__getitem__)
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert index.modules[module].spec == choose(module)
        shape = index.shape(module, lambda n: tuple(stored[n].shape), stored.__getitem__)
        assert shape == expected.shape


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HELD)
def test_transformers_alone_gives_our_logits(
    tmp_path: Path, name: str, stored: torch.dtype
) -> None:
    """Bit-equal in float32; NVFP4 after the rounding to bfloat16 that the library applies."""
    model = build_llama(stored)
    path, packed = write_artifact(tmp_path / "out", model, lambda module: SPECS[name])
    assert len(packed) == 14
    by_hand = decoded_by_hand(model, packed)
    if name == "NVFP4":
        for module, weight in packed.items():
            by_hand.get_submodule(module).weight.data = weight.dequantize(torch.bfloat16).float()
    assert same_logits(load(path), by_hand)
    if stored is torch.bfloat16:  # scales of float32 would be cast first
        half = decoded_by_hand(model, packed, torch.bfloat16)
        assert same_logits(load(path, torch.bfloat16), half)


def test_a_mix_loads_in_bfloat16(tmp_path: Path) -> None:
    def choose(module: str) -> QuantSpec:
        kinds = {"down_proj": "FP8_CHANNEL", "up_proj": "MXFP8", "gate_proj": "MXFP4"}
        leaf = module.rsplit(".", 1)[-1]
        return SPECS[kinds[leaf]] if leaf in kinds else QuantSpec(bits=4, group_size=32)

    model = build_llama(torch.bfloat16)
    path, packed = write_artifact(tmp_path / "out", model, choose)
    by_hand = decoded_by_hand(model, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = pocketlm.hf.plain_logits(path, list(range(3, 20)))
        with torch.no_grad():
            expected = by_hand(torch.arange(3, 20)[None], use_cache=False).logits[0]
    assert torch.equal(alone, expected)
    half = decoded_by_hand(model, packed, torch.bfloat16)
    assert same_logits(load(path, torch.bfloat16), half)


@pytest.mark.parametrize("name", [*TABLES, "NVFP4", "FP8_BLOCK"])
def test_our_own_format_through_transformers(tmp_path: Path, name: str) -> None:
    for build, kind in ((build_llama, "linear"), (build_gpt2, "conv1d")):
        model = build()
        path, packed = write_artifact(
            tmp_path / kind, model, lambda module: SPECS[name].fit(32), "pocketlm"
        )
        assert packed
        assert same_logits(load(path), decoded_by_hand(model, packed))
        half = decoded_by_hand(model, packed, torch.bfloat16)
        assert same_logits(load(path, torch.bfloat16), half)
