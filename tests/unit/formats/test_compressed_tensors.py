"""Stored tensors and configuration against compressed-tensors itself."""

import json
import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from tests.unit.formats.artifacts import round_to_nearest
from torch import nn

from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer
from pocketlm.core.spec import QuantSpec
from pocketlm.formats import compressed_tensors as form
from pocketlm.formats import format_for, pocketlm

SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group_size in (32, None)
]


def scheme(spec: QuantSpec) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"], weights=form.weight_args(spec), format="pack-quantized"
    )


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_tensors_are_those_of_the_library(spec: QuantSpec) -> None:
    torch.manual_seed(1)
    weight_OI = torch.randn(48, 96)
    packed = round_to_nearest(weight_OI, spec)
    ours = form.encode("a.b.weight", packed)
    local = {name.removeprefix("a.b."): tensor for name, tensor in ours.items()}
    decoded = PackedQuantizationCompressor.decompress(dict(local), scheme(spec))["weight"]
    assert torch.equal(decoded, packed.dequantize())

    state = {"weight": packed.dequantize(), "weight_scale": packed.scale_OG}
    if packed.zero_OG is not None:
        state["weight_zero_point"] = packed.zero_OG
    theirs = PackedQuantizationCompressor.compress(state, scheme(spec))
    assert theirs.keys() == local.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == local[name].dtype
        assert torch.equal(tensor, local[name]), name

    assert tuple(ours) == form.names("a.b.weight", spec)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in ours.values())
    assert form.stored_bytes(spec, (48, 96), torch.float32) == stored


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("shape", [(5, 64), (48, 96)])
def test_decode_inverts_encode(spec: QuantSpec, shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    packed = round_to_nearest(torch.randn(shape), spec, torch.bfloat16)
    again = form.decode(form.encode("m.weight", packed), "m", spec)
    assert again.bits == spec.bits
    assert torch.equal(again.codes_OI, packed.codes_OI)
    assert torch.equal(again.scale_OG, packed.scale_OG)
    if packed.zero_OG is None:
        assert again.zero_OG is None
    else:
        assert again.zero_OG is not None
        assert torch.equal(again.zero_OG, packed.zero_OG)


def test_what_cannot_be_stored_is_refused() -> None:
    packed = round_to_nearest(torch.randn(8, 64), QuantSpec(group_size=32))
    with pytest.raises(UnsupportedLayer, match=r"mlp\.gate_up_proj"):
        form.encode("mlp.gate_up_proj", packed)
    packed.scale_OG[3, 1] = math.inf
    with pytest.raises(ArtifactError, match="m: a scale is not finite"):
        form.encode("m.weight", packed)


def test_damaged_tensors_are_refused() -> None:
    spec = QuantSpec(group_size=32)
    good = form.encode("m.weight", round_to_nearest(torch.randn(8, 64), spec))
    with pytest.raises(ArtifactError, match=r"'m\.weight_scale' is missing"):
        form.decode({k: v for k, v in good.items() if "scale" not in k}, "m", spec)
    with pytest.raises(ArtifactError, match="does not divide"):
        form.decode(good | {"m.weight_scale": torch.ones(8, 3)}, "m", spec)
    with pytest.raises(ArtifactError, match=r"weight_shape is \[9, 64\]"):
        form.decode(good | {"m.weight_shape": torch.tensor([9, 64])}, "m", spec)
    with pytest.raises(ArtifactError, match="m: rows of 7 words where 64 codes of 4 bits take 8"):
        form.decode(good | {"m.weight_packed": good["m.weight_packed"][:, :7]}, "m", spec)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(64, 64) for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.down_proj = nn.Linear(64, 64)
        self.experts = nn.ModuleList(nn.ModuleDict({"down_proj": nn.Linear(64, 64)}) for _ in "ab")


def grids_by_the_library(section: dict, model: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Module path → bits and group size, as compressed-tensors reads the section."""
    from compressed_tensors.quantization import apply_quantization_config

    config = QuantizationConfig.model_validate(json.loads(json.dumps(section)))
    apply_quantization_config(model, config, show_progress=False)
    found = {}
    for name, module in model.named_modules():
        if "quantization_scheme" in module.__dict__:
            weights = module.quantization_scheme.weights
            found[name] = (weights.num_bits, weights.group_size)
    return found


def model_and_linears() -> tuple[nn.Module, list[str]]:
    blocks = nn.ModuleList(Block() for _ in "ab")
    model = nn.ModuleDict({"model": blocks, "lm_head": nn.Linear(64, 64)})
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    return model, linears


def test_one_grid_targets_all_linears() -> None:
    model, linears = model_and_linears()
    kept, chosen = linears[:1], linears[1:]
    section = form.config_section(dict.fromkeys(chosen, QuantSpec(group_size=32)), kept)
    assert [group["targets"] for group in section["config_groups"].values()] == [["Linear"]]
    assert section["ignore"] == [*kept, "lm_head"]
    assert grids_by_the_library(section, model) == dict.fromkeys(chosen, (4, 32))


def test_mixed_grids_reach_their_modules() -> None:
    model, linears = model_and_linears()
    specs = {name: QuantSpec(bits=4, group_size=32) for name in linears}
    for name in linears:
        if ".experts." in name:
            specs[name] = QuantSpec(bits=8, group_size=16)
        elif name.endswith("down_proj"):
            specs[name] = QuantSpec(bits=3, group_size=None)
    specs["model.1.attn.o_proj"] = QuantSpec(bits=8, group_size=16)
    del specs["model.0.attn.q_proj"]
    section = form.config_section(specs, ["model.0.attn.q_proj"])
    expected = {name: (spec.bits, spec.group_size) for name, spec in specs.items()}
    assert grids_by_the_library(section, model) == expected
    targets = [t for group in section["config_groups"].values() for t in group["targets"]]
    assert "Linear" not in targets
    assert r"re:(.*\.)?experts\.\d+\.down_proj$" in targets
    assert "model.0.attn.o_proj" in targets


def test_a_section_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="compressed and ignored"):
        form.config_section({"a": QuantSpec()}, ["a"])
    with pytest.raises(ConfigError, match="nothing to configure"):
        form.config_section({}, [])


def test_our_own_format_lists_transposed_modules() -> None:
    section = pocketlm.config_section({"h.0.c_attn": QuantSpec()}, ["lm_head"], ["h.0.c_attn"])
    assert section["transposed"] == ["h.0.c_attn"]
    assert section["quant_method"] == "pocketlm"
    with pytest.raises(ConfigError, match="without a grid"):
        pocketlm.config_section({"a": QuantSpec()}, [], ["b"])


def test_formats_by_name() -> None:
    assert format_for("compressed-tensors") is form
    assert format_for("pocketlm") is pocketlm
    with pytest.raises(ConfigError, match="Did you mean 'pocketlm'"):
        format_for("pocketml")
