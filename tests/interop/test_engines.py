"""`verify --engine` in the engines themselves: what is whole passes, what is damaged fails by name.

Run by `make interop`, which installs the engines and tells where they are; `-m interop` elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.unit.engine.test_export_gguf import bpe_tokenizer
from tests.unit.models.families import build

from pocketlm import api
from pocketlm.cli.main import run
from pocketlm.core.tensors import PackedInt
from pocketlm.engine.export_onnx import PYTHON as ONNX_PYTHON
from pocketlm.evaluate.engines.find import LLAMA_CPP, VLLM_PYTHON
from pocketlm.models.stored import open_stored

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
    place = {"vllm": VLLM_PYTHON, "llama.cpp": LLAMA_CPP, "onnxruntime": ONNX_PYTHON}.get(engine)
    if place is not None and place not in os.environ:
        pytest.skip(f"{engine} is not installed: `make interop` does it, or set {place}")


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp", "onnxruntime"])
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


# Prints the codes of one product by the operator's definition, with the onnx package alone.
UNPACK = """
import json, sys
import onnx
from onnx.numpy_helper import to_array
graph = onnx.load(sys.argv[1] + "/model.onnx").graph
tensors = {tensor.name: tensor for tensor in graph.initializer}
node = next(node for node in graph.node if node.name == sys.argv[2])
codes, scales, zeros = (to_array(tensors[name]) for name in node.input[1:])
rows = codes.reshape(codes.shape[0], -1)
unpacked = [[c for byte in row for c in (int(byte) & 15, int(byte) >> 4)] for row in rows]
zeros = zeros.reshape(len(rows), -1)
groups = [[z for byte in row for z in (int(byte) & 15, int(byte) >> 4)] for row in zeros]
scales = scales.reshape(len(rows), -1).tolist()
print(json.dumps({"codes": unpacked, "scales": scales, "zeros": groups}))
"""


def test_codes_in_an_onnx_file(artifact: Path, tmp_path: Path) -> None:
    """MatMulNBits holds the artifact's codes, scales and a zero point of 8."""
    needs("onnxruntime")
    made = api.export(artifact, tmp_path / "onnx", to="onnx")
    assert made.opsets["ai.onnx"] >= 21  # the first with 4-bit integers
    node = "/model/layers.1/mlp/down_proj/MatMulNBits"
    python = [os.environ[ONNX_PYTHON], "-c", UNPACK, str(made.output), node]
    said = subprocess.run(python, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    source = open_stored(artifact).packed
    assert source is not None
    weight = source.packed("model.layers.1.mlp.down_proj.weight")
    assert isinstance(weight, PackedInt)
    assert torch.equal(torch.tensor(found["codes"]) - 8, weight.codes_OI.long())
    assert torch.equal(torch.tensor(found["scales"]), weight.scale_OG.float())
    assert {zero for row in found["zeros"] for zero in row} == {8}


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
