"""Artifacts read back: ours, and what compressed-tensors' own library writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from tests.unit.formats.artifacts import build_gpt2, build_llama, round_to_nearest, write_artifact
from torch import nn

from pocketlm.core.errors import ArtifactError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.formats import compressed_tensors
from pocketlm.formats.read import CompressedIndex


@pytest.mark.parametrize("form", ["compressed-tensors", "pocketlm"])
def test_what_was_written_is_read(tmp_path: Path, form: str) -> None:
    def choose(name: str) -> QuantSpec | None:
        if "o_proj" in name:
            return None
        if "down_proj" in name or "c_proj" in name:
            return QuantSpec(bits=3, symmetric=False, group_size=None)
        return QuantSpec(group_size=32)

    model = build_llama() if form == "compressed-tensors" else build_gpt2()
    path, packed = write_artifact(tmp_path / "out", model, choose, form)
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    index = CompressedIndex.build(config, stored)
    assert index is not None
    assert index.format == form
    assert index.modules.keys() == packed.keys()
    for module, expected in packed.items():
        found = index.decode(module, stored.__getitem__)
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert found.bits == choose(module).bits
        assert index.modules[module].spec == choose(module)
        assert index.modules[module].transposed == (form == "pocketlm")
    assert {name for name in stored if "weight_" in name} == set(index.replaced)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_the_librarys_own_files_are_read(symmetric: bool, group_size: int | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "lm_head": nn.Linear(64, 32)})
    spec = QuantSpec(bits=5, symmetric=symmetric, group_size=group_size)
    section = compressed_tensors.config_section({"a": spec}, [])
    section |= {"quantization_status": "frozen"}
    config = QuantizationConfig.model_validate(section)
    apply_quantization_config(model, config, show_progress=False)
    packed = round_to_nearest(model["a"].weight.detach(), spec)
    model["a"].weight_scale.data.copy_(packed.scale_OG)
    if packed.zero_OG is not None:
        model["a"].weight_zero_point.data.copy_(packed.zero_OG)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    stored = dict(model.state_dict())
    written = compressor.quantization_config.model_dump()
    index = CompressedIndex.build({"quantization_config": written}, stored)
    assert index is not None
    assert index.modules["a"].spec == spec
    assert torch.equal(index.decode("a", stored.__getitem__).codes_OI, packed.codes_OI)


def section(**weights: Any) -> dict[str, Any]:
    built = compressed_tensors.config_section({"a": QuantSpec(group_size=32)}, [])
    built["config_groups"]["group_0"]["weights"] |= weights
    return built


STORED = ("a.weight_packed", "a.weight_scale", "a.weight_shape")


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "exl3"}, "quantized by 'exl3'"),
        (section() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (section(type="float"), "weights are 'float'"),
        (section(strategy="tensor"), "per 'tensor'"),
        (section() | {"format": "x", "config_groups": {"g": {"targets": []}}}, "the format is 'x'"),
    ],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        CompressedIndex.build({"quantization_config": quantization}, STORED)


def test_a_rounding_of_inputs_that_is_not_done_here_is_refused() -> None:
    built = section()
    built["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "actorder": "static"}
    with pytest.raises(UnsupportedModel, match="inputs are"):
        CompressedIndex.build({"quantization_config": built}, STORED)


def test_configuration_and_tensors_must_agree() -> None:
    config = {"quantization_config": section()}
    assert CompressedIndex.build({}, ["a.weight"]) is None
    with pytest.raises(ArtifactError, match="has no quantization_config"):
        CompressedIndex.build({}, STORED)
    with pytest.raises(ArtifactError, match="no tensor is packed"):
        CompressedIndex.build(config, ["a.weight"])
    with pytest.raises(ArtifactError, match=r"a\.weight_shape' is missing"):
        CompressedIndex.build(config, STORED[:2])
    with pytest.raises(ArtifactError, match=r"a\.weight_zero_point' does not belong"):
        CompressedIndex.build(config, (*STORED, "a.weight_zero_point"))
    with pytest.raises(ArtifactError, match=r"a\.weight_g_idx' does not belong"):
        CompressedIndex.build(config, ("a.weight_g_idx", *STORED))
    by_group = {"quantization_config": section(actorder="group")}
    with pytest.raises(ArtifactError, match=r"a\.weight_g_idx' is missing"):
        CompressedIndex.build(by_group, STORED)
    with pytest.raises(ArtifactError, match="has no quantization_config"):
        CompressedIndex.build({}, ["a.qweight"])


def test_activation_order_by_group_is_read() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(group_size=16, symmetric=False)
    packed = round_to_nearest(torch.randn(8, 64), spec)
    group_I = torch.randperm(64) // 16
    scale_OI, zero_OI = packed.scale_OG[:, group_I], packed.zero_OG[:, group_I].float()
    expected = scale_OI * (packed.codes_OI.float() - zero_OI)  # as releases before 0.19 decoded it
    stored = compressed_tensors.encode("a.weight", packed)
    stored["a.weight_g_idx"] = group_I.int()
    config = {"quantization_config": compressed_tensors.config_section({"a": spec}, [])}
    words = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    words["actorder"] = "group"
    index = CompressedIndex.build(config, stored)
    assert index is not None
    assert torch.equal(index.decode("a", stored.__getitem__).dequantize(), expected)


def test_a_group_size_that_the_tensors_do_not_have_is_an_error(tmp_path: Path) -> None:
    path, _ = write_artifact(tmp_path / "o", build_llama(), lambda name: QuantSpec(group_size=32))
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    index = CompressedIndex.build(config, stored)
    assert index is not None
    with pytest.raises(ArtifactError, match=r"groups of 32 where config\.json says 16"):
        index.decode("model.layers.0.mlp.up_proj", stored.__getitem__)
