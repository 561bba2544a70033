"""`verify --engine` in the engines themselves: what is whole passes, what is damaged fails by name.

Run by `make interop`, which installs the engines and tells where they are; `-m interop` elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.engine.test_export_gguf import bpe_tokenizer
from tests.unit.models.families import build

from pocketlm import api
from pocketlm.cli.main import run
from pocketlm.evaluate.engines.find import LLAMA_CPP, VLLM_PYTHON

pytestmark = pytest.mark.interop
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interop")
    build("llama", torch.bfloat16, **TINY).save_pretrained(place / "source")
    bpe_tokenizer().save_pretrained(place / "source")
    recipe = api.build_recipe(method="rtn", group_size=32)
    api.compress(place / "source", recipe, place / "artifact")
    return place / "artifact"


def needs(engine: str) -> None:
    place = {"vllm": VLLM_PYTHON, "llama.cpp": LLAMA_CPP}.get(engine)
    if place is not None and place not in os.environ:
        pytest.skip(f"{engine} is not installed: `make interop` does it, or set {place}")


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp"])
def test_an_artifact_passes(
    artifact: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(engine)
    source = str(artifact.with_name("source"))
    code = run(["verify", str(artifact), "--engine", engine, "--against", source, "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert code == 0, checks
    assert checks[f"{engine} log-probabilities"]["status"] == "passed"
    assert checks[f"{engine} greedy"]["status"] == "passed"


def test_a_file_for_llama_cpp(artifact: Path, tmp_path: Path) -> None:
    needs("llama.cpp")
    api.export(artifact, tmp_path / "m.gguf", to="gguf")
    report = api.verify(tmp_path / "m.gguf", engine="llama.cpp")
    assert report.ok, report.failures()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_wrong_scale_is_found(artifact: Path, tmp_path: Path, engine: str) -> None:
    """An engine that computes with other weights than we read would differ just so."""
    needs(engine)
    from pocketlm.evaluate.engines.find import find_engine
    from pocketlm.evaluate.verify_engine import EngineRun
    from pocketlm.evaluate.verify_files import Artifact, checks
    from pocketlm.models import open_model

    other = shutil.copytree(artifact, tmp_path / "other")
    build("llama", torch.bfloat16, **TINY).save_pretrained(tmp_path / "source")
    run_ = EngineRun(find_engine(engine), other, open_model(artifact.with_name("source")))
    found = Artifact.open(other)
    for name, _, check in checks(None):
        if name in ("config.json", "shards", "compressed weights"):
            check(found)
    run_.check_loads(found)
    from pocketlm.core.errors import ArtifactError

    with pytest.raises(ArtifactError, match="the limit is a KL of"):
        run_.check_logits(found)
