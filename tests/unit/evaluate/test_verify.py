"""A whole artifact passes every check; each kind of damage fails the check that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.unit.formats.artifacts import build_llama, write_artifact

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.evaluate import verify, verify_files
from pocketlm.evaluate.verify import VerifyReport, verify_artifact
from pocketlm.evaluate.verify_files import Artifact
from pocketlm.evaluate.verify_logits import decoded_in
from pocketlm.formats import compressed_tensors
from pocketlm.formats.read import CompressedIndex
from pocketlm.formats.safetensors_header import read_header

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "whole"
    grid = QuantSpec(bits=4, group_size=32)
    write_artifact(path, build_llama(torch.bfloat16), lambda name: grid, max_shard_bytes=50_000)
    assert (path / SHARD).is_file()
    return path


def quick(path: Path, monkeypatch: pytest.MonkeyPatch) -> VerifyReport:
    """Without the process that runs transformers."""
    monkeypatch.setattr(verify, "LOGITS", ("transformers logits", ("shards",), lambda _: ""))
    return verify_artifact(path)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def drop_entry(path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_json(path / verify_files.LEDGER, lambda data: data["tensors"].pop(name))


def lie_about_bits(path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(data: dict) -> None:
        data["tensors"][name]["bits"] -= 1

    edit_json(path / verify_files.LEDGER, change)


def forget_in_index(path: Path) -> None:
    name = "model.norm.weight"
    edit_json(path / "model.safetensors.index.json", lambda data: data["weight_map"].pop(name))


def other_group_size(path: Path) -> None:
    def change(data: dict) -> None:
        data["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16

    edit_json(path / "config.json", change)


DAMAGE = [
    (lambda path: flip_byte(path / SHARD), "files", SHARD),
    (lambda path: truncate(path / SHARD), "shards", SHARD),
    (lambda path: (path / SHARD).unlink(), "shards", SHARD),
    (lambda path: (path / SHARD).unlink(), "files", SHARD),
    (drop_entry, "accounts", "model.layers.0.mlp.up_proj"),
    (lie_about_bits, "bits per weight", "model.layers.1.mlp.up_proj.weight"),
    (lambda path: (path / "config.json").unlink(), "config.json", "config.json is missing"),
    (lambda path: (path / verify_files.LEDGER).unlink(), "ledger", "ledger.json is missing"),
    (lambda path: (path / verify_files.RECIPE).unlink(), "recipe", "recipe.yaml is missing"),
    (forget_in_index, "shards", "model.norm.weight"),
    (other_group_size, "compressed weights", "groups of 32 where config.json says 16"),
    (lambda path: shutil.copy(path / SHARD, path / "x.safetensors"), "shards", "x.safetensors"),
    (lambda path: (path / f"{SHARD}.part").write_bytes(b""), "files", f"{SHARD}.part"),
]


@pytest.mark.parametrize(("damage", "check", "said"), DAMAGE)
def test_damage_is_named(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    check: str,
    said: str,
) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    damage(path)
    report = quick(path, monkeypatch)
    assert not report.ok
    failed = {failure.name: failure.message for failure in report.failures()}
    assert said in failed[check]


def test_a_whole_artifact_passes(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = quick(whole, monkeypatch)
    outcomes = {check.name: check.status for check in report.checks}
    assert report.ok
    unchecked = {name for name, status in outcomes.items() if status == "not checked"}
    assert unchecked == {"source tensors", "tokenizer"}
    bits = next(check.message for check in report.checks if check.name == "bits per weight")
    assert bits.startswith("4.5000 ")
    assert report.model_dump()["ok"]
    assert VerifyReport.model_validate(report.model_dump(exclude={"ok"})) == report


def test_no_artifact_raises(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no"):
        verify_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="no directory"):
        verify_artifact(tmp_path / "absent")


def test_checks_after_a_failed_one_are_not_called_passed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    (path / "config.json").unlink()
    outcomes = {check.name: check for check in quick(path, monkeypatch).checks}
    assert outcomes["compressed weights"].status == "not checked"
    assert "config.json" in outcomes["compressed weights"].message
    assert outcomes["accounts"].status == "not checked"


def test_tied_weights_stored_twice_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    path, _ = write_artifact(tmp_path / "out", model, lambda name: QuantSpec(group_size=32))
    edit_json(path / "config.json", lambda data: data.update(tie_word_embeddings=True))
    failed = {failure.name: failure.message for failure in quick(path, monkeypatch).failures()}
    assert "lm_head.weight: repeats 'model.embed_tokens.weight'" in failed["tied weights"]


def test_the_source_is_compared(whole: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_llama(torch.bfloat16).save_pretrained(source)
    artifact = verify_files.Artifact.open(whole)
    verify_files.check_ledger(artifact)
    assert verify_files.check_source(artifact, source).startswith("all 21 tensors")
    assert artifact.ledger is not None
    artifact.ledger.tensors.pop("model.norm.weight")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: is not explained"):
        verify_files.check_source(artifact, source)


@pytest.mark.usefixtures("in_process")
def test_plain_transformers_agrees_bit_for_bit(whole: Path) -> None:
    report = verify_artifact(whole)
    assert report.ok, report.failures()
    assert report.checks[-1].message.startswith("bit-equal to transformers, float32, 16 tokens")


def test_what_transformers_rounds_to_16_bits(tmp_path: Path) -> None:
    """Integer experts, all linears of a model with zero points, NVFP4: by dtype of their scales."""

    def found(spec: QuantSpec, names: list[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
        artifact = Artifact(tmp_path)
        section = compressed_tensors.config_section(dict.fromkeys(names, spec), [])
        artifact.config = {"quantization_config": section}
        stored = {f"{name}.weight_scale": torch.ones(1, 1, dtype=dtype) for name in names}
        save_file(stored, tmp_path / "scales")
        infos = read_header(tmp_path / "scales")
        artifact.tensors = {name: (tmp_path, info) for name, info in infos.items()}
        roles = compressed_tensors.LAYOUTS[section["format"]].roles(spec)
        index = CompressedIndex.build(artifact.config, [f"{n}.{r}" for n in names for r in roles])
        assert index is not None
        return decoded_in(artifact, index)

    linear, expert = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj"
    int4, bf16 = QuantSpec(bits=4, group_size=32), torch.bfloat16
    assert found(int4, [linear, expert], bf16) == {expert: bf16}
    assert found(int4, [linear, expert], torch.float32) == {}
    zeros = QuantSpec(bits=4, group_size=32, symmetric=False)
    assert found(zeros, [linear], torch.float16) == {linear: torch.float16}
