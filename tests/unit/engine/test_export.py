"""Compressed models in other formats: same weights, run from codes, losses told, refusals early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from safetensors.torch import load_file, save_file
from tests.unit.runtime.helpers import write_twins
from tests.unit.runtime.test_load import both_logits, llama, projections

from pocketlm import api
from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt, Sparse
from pocketlm.formats import format_for
from pocketlm.models import open_model
from pocketlm.models.stored import open_stored
from pocketlm.runtime.load import packed_summary
from pocketlm.runtime.permuted import PermutedLinear

W4 = QuantSpec(bits=4, group_size=32)
W4A = QuantSpec(bits=4, group_size=32, symmetric=False)


def twins(directory: Path, spec: QuantSpec = W4) -> tuple[Path, Path]:
    """A tiny Llama compressed, and the same weights decoded."""
    model = llama()
    return write_twins(directory, model, dict.fromkeys(projections(model), spec))


def edit(directory: Path, **words: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= words
    path.write_text(json.dumps(config))


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    source = open_stored(directory).source
    return {name: source.read(name) for name in source.infos()}


def same(found: Path, expected: Path) -> bool:
    one, other = decoded(found), load_file(expected / "model.safetensors")
    return one.keys() == other.keys() and all(
        torch.equal(one[name].float(), other[name].float()) for name in one
    )


@pytest.mark.parametrize("spec", [W4, W4A], ids=repr)
def test_formats_are_converted_without_the_original(tmp_path: Path, spec: QuantSpec) -> None:
    """Through every format and back: the decoded weights are the same bits, the head untouched."""
    packed, dense = twins(tmp_path, spec)
    before = packed
    for form in ("gptq_v2", "awq", "compressed-tensors", "dense"):
        out = tmp_path / f"as-{form}"
        found = api.export(before, out, to=form, dtype="float32" if form == "dense" else None)
        assert same(out, dense), form
        if form != "dense":
            assert found.notes == ["14 linears decode to the same values, bit for bit."]
            assert found.bytes_after < 0.6 * sum(f.stat().st_size for f in dense.iterdir())
        assert (out / "tokenizer.json").exists()
        before = out
    assert json.loads((before / "pocketlm/export.json").read_text())["form"] == "dense"


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_foreign_files_run_from_their_codes(tmp_path: Path, form: str) -> None:
    packed, dense = twins(tmp_path)
    api.export(packed, tmp_path / form, to=form)
    model, ours, truth = both_logits(tmp_path / form, dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    assert packed_summary(model).linears == 14
    assert not packed_summary(model).fallbacks
    found = api.inspect(tmp_path / form, probe=False)
    text = f"{form.removesuffix('_v2')}, INT4{' with zero points' * (form == 'awq')}, groups of 32"
    assert found.compressed == {text: 14}
    assert found.bytes_stored == sum(
        t.nbytes for t in load_file(tmp_path / form / "model.safetensors").values()
    )
    with pytest.raises(UnsupportedModel, match=r"already quantized.*pocketlm export"):
        open_model(tmp_path / form)


def test_activation_order_of_other_tools_is_kept(tmp_path: Path) -> None:
    """Scattered groups: run with permuted inputs, handed on to gptq, refused where they end."""
    packed, dense = twins(tmp_path)
    api.export(packed, tmp_path / "gptq", to="gptq")
    file, draw = tmp_path / "gptq/model.safetensors", torch.Generator().manual_seed(0)
    stored, plain = load_file(file), load_file(dense / "model.safetensors")
    for name in [name for name in stored if name.endswith("q_proj.g_idx")]:
        module, group_I = name.removesuffix(".g_idx"), stored[name]
        order_I = torch.randperm(len(group_I), generator=draw)
        weight = format_for("gptq").decode(stored, module, W4)
        codes_OI = weight.codes_OI[:, order_I]  # the linear with its inputs in another order
        moved = PackedInt(codes_OI, weight.scale_OG, None, 4)
        stored |= format_for("gptq").encode(f"{module}.weight", moved)
        stored[name] = group_I[order_I].contiguous()
        plain[f"{module}.weight"] = plain[f"{module}.weight"][:, order_I].contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "gptq", desc_act=True)
    model, ours, truth = both_logits(tmp_path / "gptq", dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    assert sum(isinstance(module, PermutedLinear) for module in model.modules()) == 2
    api.export(tmp_path / "gptq", tmp_path / "v2", to="gptq_v2")
    assert same(tmp_path / "v2", dense)
    section = json.loads((tmp_path / "v2/config.json").read_text())["quantization_config"]
    assert section["desc_act"] is True
    for form, target in (("compressed-tensors", None), ("awq", None), ("gptq", "vllm")):
        with pytest.raises(UnsupportedLayer, match=r"q_proj: .*lie scattered .*dense"):
            api.export(tmp_path / "gptq", tmp_path / "no", to=form, target=target)
        assert not list(tmp_path.glob("*no*"))  # nothing half-written stays


def test_mlx_gets_uint32_words_and_its_words_in_config(tmp_path: Path) -> None:
    packed, _ = twins(tmp_path)
    found = api.export(packed, tmp_path / "mlx", to="mlx")
    assert found.notes == ["14 linears decode to the same values, bit for bit."]
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert config["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert "quantization_config" not in config
    stored = load_file(tmp_path / "mlx/model.safetensors")
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype is torch.uint32


def test_sparse_codes_become_whole_ones(tmp_path: Path) -> None:
    """In our own format only kept weights are stored; elsewhere zeros are codes like others."""
    packed, dense = twins(tmp_path)
    file = packed / "model.safetensors"
    stored, specs = load_file(file), {}
    for name in [name for name in stored if name.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        weight = format_for("compressed-tensors").decode(stored, module, W4)
        sparse = Sparse(weight, weight.codes_OI != 0)
        specs[module] = sparse.spec
        stored |= format_for("pocketlm").encode(f"{module}.weight", sparse)
    save_file(stored, file, metadata={"format": "pt"})
    config = format_for("pocketlm").config_section(specs, [])
    edit(packed, **config)
    found = api.export(packed, tmp_path / "gptq", to="gptq", target="vllm")
    assert found.notes == [
        "14 linears decode to the same values, bit for bit.",
        "14 sparse linears hold their zeros like other values.",
    ]
    assert same(tmp_path / "gptq", dense)


def test_a_bias_that_the_model_lacks_is_dropped_only_if_zero(tmp_path: Path) -> None:
    packed, dense = twins(tmp_path)
    api.export(packed, tmp_path / "gptq", to="gptq")
    file, name = tmp_path / "gptq/model.safetensors", "model.layers.0.mlp.up_proj.bias"
    stored = load_file(file)
    save_file({**stored, name: torch.zeros(96)}, file, metadata={"format": "pt"})
    _, ours, truth = both_logits(tmp_path / "gptq", dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    save_file({**stored, name: torch.ones(96)}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="no place for"):
        api.load(tmp_path / "gptq")
    with pytest.raises(ArtifactError, match="no place for"):
        open_model(tmp_path / "gptq", allow_compressed=True)


def test_scales_that_float16_rounds_are_told(tmp_path: Path) -> None:
    packed, _ = twins(tmp_path)
    file = packed / "model.safetensors"
    stored = load_file(file)
    for name in [name for name in stored if name.endswith("weight_scale")]:
        stored[name] = stored[name].float() * 1.0001
    save_file(stored, file, metadata={"format": "pt"})
    (note,) = api.export(packed, tmp_path / "awq", to="awq").notes
    assert note.startswith("14 of 14 linears changed, by at most ")
    assert 1e-5 < float(note.split("at most ")[1].split()[0]) < 5e-4


def test_rounded_inputs_stay_only_where_they_can(tmp_path: Path) -> None:
    packed, _ = twins(tmp_path)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = inputs
    edit(packed, **config)
    notes = api.export(packed, tmp_path / "gptq", to="gptq").notes
    assert notes[1] == "the inputs of 14 linears are not rounded any more."
    assert len(api.export(packed, tmp_path / "ct", to="compressed-tensors").notes) == 1
    written = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert written["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_a_rounded_cache_is_carried_over_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed, dense = twins(tmp_path)
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    edit(packed, kv_cache_scheme=json.loads(args.model_dump_json()))
    file = packed / "model.safetensors"
    scales = {
        f"model.layers.{i}.self_attn.{part}_scale": torch.tensor([0.5 + i])
        for i in range(2)
        for part in "kv"
    }
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    assert len(api.export(packed, tmp_path / "ct", to="compressed-tensors").notes) == 1
    stored = load_file(tmp_path / "ct/model.safetensors")
    assert all(torch.equal(stored[name], scale) for name, scale in scales.items())
    section = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate(section).kv_cache_scheme == args
    for form, dtype in (("dense", "float32"), ("awq", None)):
        notes = api.export(packed, tmp_path / f"as-{form}", to=form, dtype=dtype).notes
        assert "the cache of keys and values is not rounded any more" in notes[-1]
        assert same(tmp_path / f"as-{form}", dense)
    _, ours, truth = both_logits(packed, dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    assert "round the cache" in caplog.text


@pytest.mark.parametrize(
    ("spec", "form", "target", "said"),
    [
        (
            QuantSpec(bits=8, type="float", group_size=None),
            "gptq",
            None,
            "integers only, not FP8_CHANNEL.*--to compressed-tensors",
        ),
        (QuantSpec(bits=3, group_size=32), "awq", None, "has 4 bits, not 3.*compressed-tensors"),
        (QuantSpec(bits=5, group_size=32), "gptq", "vllm", "not 5.*--to dense"),
        (W4A, "gptq", "vllm", "no kernel for asymmetric 4 bits"),
        (QuantSpec(bits=4, group_size=16), "awq", "vllm", "groups of 16"),
        (W4, "mlx", "pocketlm", "pocketlm does not load mlx. It loads dense, compressed-tensors"),
        (W4, "gptq", "llama.cpp", "llama.cpp does not load gptq. It loads dense"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(
    tmp_path: Path, spec: QuantSpec, form: str, target: str | None, said: str
) -> None:
    packed, _ = twins(tmp_path, spec)
    with pytest.raises(UnsupportedLayer, match=said):
        api.export(packed, tmp_path / "out", to=form, target=target)
    assert not (tmp_path / "out").exists()


def test_what_makes_no_sense_is_said(tmp_path: Path) -> None:
    packed, dense = twins(tmp_path)
    with pytest.raises(ConfigError, match="weights stay codes"):
        api.export(packed, tmp_path / "out", to="awq", dtype="float16")
    with pytest.raises(ConfigError, match=r"no compressed weights.*dense"):
        api.export(dense, tmp_path / "out", to="gptq")
    with pytest.raises(ConfigError, match="Did you mean 'gptq'"):
        api.export(packed, tmp_path / "out", to="gtpq")
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        api.export(packed, tmp_path / "out", to="gptq", target="vlm")
    edit(packed, quant_method="exl3")
    with pytest.raises(UnsupportedModel, match="compressed-tensors, gptq, pocketlm"):
        api.export(packed, tmp_path / "out", to="gptq")
    with pytest.raises(UnsupportedModel, match="compressed-tensors, gptq, pocketlm"):
        open_model(packed, allow_compressed=True)
