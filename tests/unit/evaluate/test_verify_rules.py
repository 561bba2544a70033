"""Rules that engines break on: each kind of damage fails the rule that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.formats.artifacts import build_llama, write_artifact

from pocketlm import api
from pocketlm.core.errors import ArtifactError, UnsupportedLayer
from pocketlm.core.spec import QuantSpec
from pocketlm.evaluate.verify_files import Artifact, NotChecked, checks
from pocketlm.evaluate.verify_rules import Rules, expects_packed
from pocketlm.models import open_model

GRID = QuantSpec(bits=4, group_size=32)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    def choose(name: str) -> QuantSpec | None:
        return None if name.endswith("layers.1.self_attn.o_proj") else GRID

    return write_artifact(tmp_path / "artifact", build_llama(torch.bfloat16), choose)[0]


def opened(path: Path) -> Artifact:
    found = Artifact.open(path)
    for name, _, check in checks(None):
        if name in ("config.json", "shards", "compressed weights"):
            check(found)
    return found


def rules(path: Path, target: str = "vllm", **options: object) -> Rules:
    return Rules(open_model(path, allow_compressed=True), target, **options)  # type: ignore[arg-type]


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((path / "config.json").read_text())
    change(data["quantization_config"])
    (path / "config.json").write_text(json.dumps(data))


def test_what_is_written_keeps_the_rules(artifact: Path) -> None:
    found, kept = opened(artifact), rules(artifact)
    assert kept.check_formats(found).startswith("13 grids")
    assert kept.check_fused(found).startswith("4 fused layers")
    assert kept.check_ignored(found).startswith("13 linears are packed, 2 are not")
    assert "steps away from 0" in kept.check_zero_points(found)
    with pytest.raises(NotChecked, match="no tokenizer"):
        kept.check_template(found)
    assert kept.check_beside(found) == "none."


def test_a_list_that_says_otherwise(artifact: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    edit(artifact, lambda section: section["ignore"].append(name))
    with pytest.raises(ArtifactError, match=r"up_proj: is stored packed, but ignored"):
        rules(artifact).check_ignored(opened(artifact))
    edit(artifact, lambda section: section.update(ignore=["lm_head"]))
    with pytest.raises(ArtifactError, match=r"layers\.1\.self_attn\.o_proj: is stored as it was"):
        rules(artifact).check_ignored(opened(artifact))


@pytest.mark.parametrize(
    ("section", "name", "expected"),
    [
        ({"quant_method": "gptq", "dynamic": {"-:^a\\.0\\.q$": {}}}, "a.0.q", False),
        ({"quant_method": "gptq", "dynamic": {"-:^a\\.0\\.q$": {}}}, "a.0.k", True),
        ({"quant_method": "gptq"}, "lm_head", None),
        ({"quant_method": "awq", "modules_to_not_convert": ["gate"]}, "a.0.gate_proj", False),
        ({"quant_method": "awq", "modules_to_not_convert": None}, "a.0.gate_proj", True),
        ({"quant_method": "pocketlm", "groups": [{"modules": ["a.0.q"]}]}, "a.0.q", True),
        ({"quant_method": "pocketlm", "groups": []}, "a.0.q", False),
    ],
)
def test_what_engines_expect(section: dict, name: str, expected: bool | None) -> None:
    assert expects_packed(section, name) is expected


def test_fused_linears_and_formats(tmp_path: Path) -> None:
    def choose(name: str) -> QuantSpec:
        return QuantSpec(bits=8, group_size=32) if name.endswith("0.self_attn.k_proj") else GRID

    path, _ = write_artifact(tmp_path / "mixed", build_llama(), choose)
    with pytest.raises(UnsupportedLayer, match="has another grid than"):
        rules(path).check_fused(opened(path))
    rules(path, "transformers").check_fused(opened(path))
    with pytest.raises(UnsupportedLayer, match="no kernel for symmetric 8 bits"):
        rules(path, "vllm-cpu").check_formats(opened(path))
    own, _ = write_artifact(tmp_path / "own", build_llama(), lambda name: GRID, "pocketlm")
    with pytest.raises(ArtifactError, match="vllm does not load the format pocketlm"):
        rules(own).check_formats(opened(own))


def test_of_a_dense_model_there_is_nothing_to_check(artifact: Path, tmp_path: Path) -> None:
    api.export(artifact, tmp_path / "dense", to="dense")
    files = Artifact.open(tmp_path / "dense")
    for name, _, check in checks(None):
        if name in ("config.json", "shards"):
            check(files)
    for name, _, check in rules(tmp_path / "dense").checks():
        if name in ("number formats", "fused linears", "ignore list", "zero points"):
            with pytest.raises(NotChecked, match="no weight is packed"):
                check(files)


def test_zero_points_of_another_convention(tmp_path: Path) -> None:
    """Of a symmetric grid the reader says so itself; of others the weights tell."""
    grid = QuantSpec(bits=4, group_size=32, symmetric=False)
    path, _ = write_artifact(tmp_path / "ct", build_llama(), lambda name: grid)
    api.export(path, tmp_path / "gptq", to="gptq_v2")
    rules(tmp_path / "gptq").check_zero_points(opened(tmp_path / "gptq"))
    edit(tmp_path / "gptq", lambda section: section.update(checkpoint_format="gptq"))
    with pytest.raises(ArtifactError, match="another convention"):
        rules(tmp_path / "gptq").check_zero_points(opened(tmp_path / "gptq"))


def test_splitting_over_gpus(artifact: Path) -> None:
    said = rules(artifact).check_split(opened(artifact))
    # 64 and 160 columns in groups of 32: five groups of down_proj do not halve
    assert said.startswith("can be split over 1 GPUs; not over 2: 160 columns in groups of 32")
    with pytest.raises(ArtifactError, match=r"cannot be split over 2 GPUs.*down_proj"):
        rules(artifact, split=2).check_split(opened(artifact))


def test_tensors_beside_the_decoder(artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_llama(torch.bfloat16).save_pretrained(source)
    draft = {"mtp.layers.0.eh_proj.weight": torch.ones(4, 4), "visual.patch.weight": torch.ones(2)}
    file = source / "model.safetensors"
    save_file({**load_file(file), **draft}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"eh_proj\.weight: was left behind"):
        rules(artifact, against=source).check_beside(opened(artifact))
    packed = artifact / "model.safetensors"
    kept = load_file(packed)
    save_file({**kept, **draft}, packed, metadata={"format": "pt"})
    assert rules(artifact, against=source).check_beside(opened(artifact)).startswith("2 tensors")
    save_file({**kept, **draft, "visual.patch.weight": torch.zeros(2)}, packed)
    with pytest.raises(ArtifactError, match=r"visual\.patch\.weight: is not what it was"):
        rules(artifact, against=source).check_beside(opened(artifact))
    save_file(kept, packed, metadata={"format": "pt"})
    data = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**data, "num_nextn_predict_layers": 1}))
    with pytest.raises(ArtifactError, match="promises multi-token prediction"):
        rules(artifact).check_beside(opened(artifact))


def test_the_chat_template(tmp_path: Path) -> None:
    from tests.unit.engine.test_export_gguf import TEMPLATE, bpe_tokenizer

    source = tmp_path / "source"
    build_llama().save_pretrained(source)
    bpe_tokenizer().save_pretrained(source)
    path, _ = write_artifact(tmp_path / "artifact", build_llama(), lambda name: GRID)
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(path)
    assert rules(path).check_template(opened(path)) == f"{len(TEMPLATE)} characters."
    assert rules(path, against=source).check_template(opened(path)) == "the original's."
    tokenizer.chat_template = None
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    with pytest.raises(ArtifactError, match="chat template is lost"):
        rules(path, against=source).check_template(opened(path))
