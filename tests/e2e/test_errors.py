"""Every bad input of the main job, through the real command line: a typed error, exit code 2,
a message with place and remedy, and nothing half-written that looks whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.conftest import QUICK, Done

Cli = Callable[..., Done]
WEIGHTS = "model.safetensors"


def refuses(
    cli: Cli, source: object, output: Path, kind: str, *said: str, flags: tuple[object, ...] = ()
) -> Done:
    """Compresses and expects the error; checks that no artifact came of it."""
    done = cli("compress", source, "-o", output, "--json", *QUICK, *flags)
    assert done.code == 2, done
    error = done.json["error"]
    assert error["type"] == kind, error
    assert error["exit_code"] == 2
    assert error["remedy"], error
    assert error["where"], error
    whole = f"{error['where']} {error['what']} {error['remedy']}"
    for words in said:
        assert words in whole, whole
    assert "Traceback" not in done.err
    assert not (output / "config.json").exists()
    return done


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, **changes}), "utf-8")


def test_a_missing_path(cli, tmp_path):
    refuses(cli, tmp_path / "absent", tmp_path / "out", "SourceError", "absent")


def test_a_directory_without_a_model(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(cli, tmp_path / "empty", tmp_path / "out", "SourceError", "config.json")


def test_a_config_that_is_no_json(cli, model, tmp_path):
    (model / "config.json").write_text("{", "utf-8")
    refuses(cli, model, tmp_path / "out", "SourceError", "config.json")


def test_not_a_causal_language_model(cli, model, tmp_path):
    change_config(model, model_type="vit", architectures=["ViTForImageClassification"])
    refuses(cli, model, tmp_path / "out", "UnsupportedModel", "ViT")


def test_truncated_safetensors(cli, model, tmp_path):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    refuses(cli, model, tmp_path / "out", "SourceError", WEIGHTS)


def test_corrupt_safetensors_header(cli, model, tmp_path):
    path = model / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    refuses(cli, model, tmp_path / "out", "SourceError", WEIGHTS)


def test_a_corrupt_gguf_file(cli, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 200)
    refuses(cli, path, tmp_path / "out", "SourceError", "model.gguf")


def test_an_index_that_names_an_absent_shard(cli, model, tmp_path):
    names = load_file(model / WEIGHTS)
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"metadata": {}, "weight_map": {n: files[i % 2] for i, n in enumerate(sorted(names))}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    refuses(cli, model, tmp_path / "out", "SourceError", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(cli, model, tmp_path, value, name):
    tensors = load_file(model / WEIGHTS)
    tensors[name][3, 5] = value
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    refuses(cli, model, tmp_path / "out", "SourceError", name)


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("Too short.", "10 tokens")])
def test_calibration_text_that_does_not_do(cli, source, tmp_path, text, said):
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    flags = ("--calibration", path)
    refuses(cli, source, tmp_path / "out", "CalibrationError", "text.txt", said, flags=flags)


def test_calibration_text_that_is_absent(cli, source, tmp_path):
    flags = ("--calibration", tmp_path / "absent.txt")
    refuses(cli, source, tmp_path / "out", "CalibrationError", "absent.txt", flags=flags)


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [
        (("--method", "gtpq"), "gptq"),
        (("--scheme", "W4A61"), "W4A16"),
        (("--target", "vlm"), "vllm"),
        (("--recipe", "w4a61"), "w4a16"),
        (("--calibration", "biultin"), "builtin"),
    ],
)
def test_unknown_names_offer_the_nearest(cli, source, tmp_path, flags, nearest):
    kind = "CalibrationError" if flags[0] == "--calibration" else "ConfigError"
    refuses(cli, source, tmp_path / "out", kind, nearest, flags=flags)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("steps: [gptq]\nweigths: {bits: 4}\n", "weights"),
        ("steps: [{method: gptq, dampening: 0.1}]\n", "damping"),
        ("steps: [gptq]\nweights: {bits: 40}\n", "bits"),
        ("steps: []\n", "steps"),
        ("- gptq\n", "steps"),
    ],
)
def test_a_recipe_that_cannot_be(cli, source, tmp_path, recipe, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, "utf-8")
    done = cli("compress", source, "-o", tmp_path / "out", "--json", "--recipe", path)
    assert done.code == 2
    error = done.json["error"]
    assert error["type"] == "ConfigError"
    assert said in f"{error['what']} {error['remedy']}"


def test_a_recipe_beside_a_method(cli, source, tmp_path):
    flags = ("--recipe", "w4a16", "--method", "rtn")
    refuses(cli, source, tmp_path / "out", "ConfigError", "--recipe and --method", flags=flags)


def test_a_pattern_that_leaves_nothing(cli, source, tmp_path):
    done = cli("compress", source, "-o", tmp_path / "out", "--json", "--ignore", "Linear", *QUICK)
    assert done.code == 2
    assert done.json["error"]["type"] == "ConfigError"


def test_an_output_directory_of_somebody_else(cli, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work", "utf-8")
    refuses(cli, source, tmp_path / "out", "OutputBusy", "out", "-o")
    assert cli("compress", source, "-o", tmp_path / "out", "--restart", *QUICK).code == 2
    assert (tmp_path / "out" / "thesis.txt").read_text("utf-8") == "years of work"


def test_an_artifact_of_another_recipe(cli, source, tmp_path):
    output = tmp_path / "out"
    assert cli("compress", source, "-o", output, *QUICK).code == 0
    before = (output / WEIGHTS).read_bytes()
    done = cli("compress", source, "-o", output, "--json", "--bits", "3", *QUICK)
    assert done.code == 2
    assert done.json["error"]["type"] == "OutputBusy"
    assert "--restart" in done.json["error"]["remedy"]
    assert (output / WEIGHTS).read_bytes() == before
    assert cli("compress", source, "-o", output, "--bits", "3", "--restart", *QUICK).code == 0
    assert (output / WEIGHTS).read_bytes() != before


def test_a_source_that_is_already_quantized(cli, artifact, tmp_path):
    refuses(cli, artifact, tmp_path / "out", "UnsupportedModel", "quantized")


def test_a_model_that_brings_its_own_code(cli, model, tmp_path):
    (model / "modeling_own.py").write_text("raise SystemExit('it ran')", "utf-8")
    change_config(
        model, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    )
    refuses(cli, model, tmp_path / "out", "SecurityError", "--trust-remote-code")


def test_pickle_checkpoints(cli, model, tmp_path):
    (model / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(2)}, model / "pytorch_model.bin")
    refuses(cli, model, tmp_path / "out", "SecurityError", "pytorch_model.bin", "save_pretrained")


def test_a_device_that_is_not_there(cli, source, tmp_path):
    refuses(cli, source, tmp_path / "out", "ConfigError", "cuda:99", flags=("--device", "cuda:99"))


def test_verify_of_what_is_no_artifact(cli, source, tmp_path):
    for path in (tmp_path / "absent", source):
        done = cli("verify", path, "--json")
        assert done.code == 2
    assert cli("verify", tmp_path / "absent", "--json").json["error"]["type"] == "ArtifactError"


def test_report_of_what_is_no_artifact(cli, tmp_path):
    done = cli("report", tmp_path, "--json")
    assert (done.code, done.json["error"]["type"]) == (2, "ArtifactError")


def test_eval_text_that_is_too_short(cli, source, tmp_path):
    (tmp_path / "text.txt").write_text("Short.", "utf-8")
    done = cli("eval", source, "--text", tmp_path / "text.txt", "--no-speed", "--json")
    assert (done.code, done.json["error"]["type"]) == (2, "CalibrationError")


def test_generate_needs_a_prompt(cli, source):
    done = cli("generate", source, "--prompt", "", "--raw", "--json")
    assert (done.code, done.json["error"]["type"]) == (2, "ConfigError")
