"""Export to ONNX with a builder that is played: what it wrote is read back, what it broke is found.

The builder itself, and the engine, run in `tests/interop` (`make interop`).
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tests.unit.runtime.helpers import write_twins
from tests.unit.runtime.test_load import llama, projections

from pocketlm import api
from pocketlm.core.errors import (
    ArtifactError,
    ConfigError,
    EngineMissing,
    OutputBusy,
    PocketLMError,
    UnsupportedLayer,
    UnsupportedModel,
)
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.engine.export_onnx import PYTHON
from pocketlm.formats.layouts import olive_packed

W4 = QuantSpec(bits=4, group_size=32)
W4A = QuantSpec(bits=4, group_size=32, symmetric=False)
W8 = QuantSpec(bits=8, group_size=32)

# Plays the builder: joins query, key, value and writes what lies where; FAULT breaks something.
BUILDER = """
import json, sys
from pathlib import Path
import numpy
from safetensors.numpy import load_file
fault = FAULT
_, source, output, precision, answer, *options = sys.argv[1:]
if fault == "refuse":
    raise NotImplementedError("The tiny model is not currently supported.")
tensors = load_file(Path(source) / "model.safetensors")
section = json.loads((Path(source) / "config.json").read_text()).get("quantization_config")
Path(output).mkdir()
(Path(output) / "model.onnx").write_bytes(b"graph")
products, data = [], bytearray()
modules = [name[:-8] for name in tensors if name.endswith(".qweight")]
joined = "fuse_qkv=True" in options
for module in modules:
    leaf, layer = module.split(".")[-1], module.split(".")[2]
    if joined and leaf in ("k_proj", "v_proj") or fault == "lose" and leaf == "o_proj":
        continue
    parts = [module]
    if joined and leaf == "q_proj":
        leaf, parts = "qkv_proj", [module.replace("q_proj", n + "_proj") for n in "qkv"]
    grid = {**section, **section.get("overrides", {}).get(module, {})}
    place, rows = {}, 0
    for role in ("qweight", "scales", "qzeros"):
        values = numpy.concatenate([tensors[f"{part}.{role}"] for part in parts])
        rows, width = values.shape
        if role == "scales":
            values = values.astype("float32")
        if role == "qweight":
            columns = width * 8 // grid["bits"]
            if fault == "change" and leaf == "down_proj":
                values[3, 5] += 1
        raw = values.tobytes()
        place[role] = {"file": "model.onnx.data", "offset": len(data), "bytes": len(raw)}
        data += raw
    products.append({"name": f"/model/layers.{layer}/x/{leaf}/MatMulNBits", "kind": "MatMulNBits",
        "bits": grid["bits"], "block_size": grid["group_size"], "N": rows, "K": columns,
        "parts": place})
if fault == "head":
    products.append({"name": "/lm_head/MatMul_Q4", "kind": "MatMulNBits", "parts": {}})
(Path(output) / "model.onnx.data").write_bytes(data)
(Path(output) / "genai_config.json").write_text("{}")
Path(answer).write_text(json.dumps({"versions": {"onnxruntime-genai": "0"}, "products": products,
    "opsets": {"ai.onnx": 22, "com.microsoft": 1}}))
"""


def played(directory: Path, fault: str | None = None) -> Path:
    """A program that stands for a Python with the builder."""
    script, program = directory / "builder.py", directory / "python"
    script.write_text(BUILDER.replace("FAULT", repr(fault)))
    run = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"
    found = int(fault == "absent")
    program.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {found}\nexec {run} "$@"\n')
    program.chmod(0o755)
    return program


def artifact(directory: Path, **others: QuantSpec) -> Path:
    model = llama()
    specs = {name: others.get(name.rpartition(".")[2], W4) for name in projections(model)}
    return write_twins(directory, model, specs)[0]


def test_codes_reach_the_file(tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    made = api.export(artifact(tmp_path), out, to="onnx", engine_python=played(tmp_path))
    assert made.opsets == {"ai.onnx": 22, "com.microsoft": 1}
    assert made.notes[0] == "14 linears decode to the same values, bit for bit."
    assert made.notes[1].startswith("opsets ai.onnx 22, com.microsoft 1; built by")
    assert made.bytes_after == sum(file.stat().st_size for file in out.glob("model.onnx*"))
    files = {file.name for file in out.iterdir()}
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "config.json"} <= files
    assert not any(file.endswith(".safetensors") for file in files)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "pocketlm/export.json").read_text())["opsets"] == made.opsets
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".onnx")]


def test_a_finished_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a program beside the user is found, though a Path drops its ``./``."""
    played(tmp_path)
    monkeypatch.chdir(tmp_path)
    api.export(artifact(tmp_path), tmp_path / "onnx", to="onnx", engine_python=Path("./python"))
    for refuses in (api.verify, api.inspect):
        with pytest.raises(
            PocketLMError, match="directory of ONNX Runtime GenAI, which is written"
        ):
            refuses(tmp_path / "onnx")


def test_an_output_that_is_no_place(tmp_path: Path) -> None:
    source = artifact(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputBusy, match="is a file"):
        api.export(source, tmp_path / "file", to="dense")
    for inside in (source / "below", source):
        with pytest.raises(ConfigError, match="lies in the model itself"):
            api.export(source, inside, to="dense")
    assert not (source / "below").exists()


@pytest.mark.parametrize("others", [{"k_proj": W8}, {"o_proj": W4A, "up_proj": W8}], ids=str)
def test_several_grids_stand_in_one_file(tmp_path: Path, others: dict[str, QuantSpec]) -> None:
    """Query, key and value are joined only where they have one grid."""
    source = artifact(tmp_path, **others)
    made = api.export(source, tmp_path / "onnx", to="onnx", engine_python=played(tmp_path))
    assert made.notes[0] == "14 linears decode to the same values, bit for bit."


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("change", ArtifactError, r"down_proj: the built file holds other values"),
        ("lose", ArtifactError, r"block \d has o_proj no more"),
        ("head", ArtifactError, r"lm_head/MatMul_Q4: is quantized in the built file"),
        ("refuse", UnsupportedModel, r"refuses it: NotImplementedError: The tiny model is not"),
        ("absent", EngineMissing, r"needs ONNX Runtime GenAI.*pip install onnxruntime-genai"),
    ],
)
def test_a_broken_build_leaves_nothing(
    tmp_path: Path, fault: str, error: type[Exception], said: str
) -> None:
    source, python = artifact(tmp_path), played(tmp_path, fault)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=said):
        api.export(source, tmp_path / "onnx", to="onnx", engine_python=python)
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_held_names_the_decoded_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, str(played(tmp_path)))
    odd = artifact(tmp_path / "odd", down_proj=QuantSpec(bits=3, group_size=32))
    with pytest.raises(UnsupportedLayer, match=r"2, 4, 8 bits, not 3.*--dtype float32"):
        api.export(odd, tmp_path / "out", to="onnx")
    model = llama()
    part = [name for name in projections(model) if not name.endswith("o_proj")]
    kept, _ = write_twins(tmp_path / "kept", model, dict.fromkeys(part, W4))
    with pytest.raises(UnsupportedLayer, match=r"o_proj: is not compressed.*--dtype float32"):
        api.export(kept, tmp_path / "out", to="onnx")
    decoded = api.export(kept, tmp_path / "out", to="onnx", dtype="float32")
    assert decoded.decoded == len(part)
    plain = tmp_path / "kept" / "dense"
    with pytest.raises(ConfigError, match=r"holds no codes.*--dtype float32"):
        api.export(plain, tmp_path / "no", to="onnx")
    assert api.export(plain, tmp_path / "plain", to="onnx", dtype="float32").decoded == 0
    with pytest.raises(ConfigError, match=r"--dtype: decoded weights.*float32"):
        api.export(kept, tmp_path / "no", to="onnx", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"--engine-python: it is for --to onnx"):
        api.export(kept, tmp_path / "no", to="gptq", engine_python=sys.executable)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layout_byte_by_byte(bits: int) -> None:
    """Against the definition of MatMulNBits: unsigned, the first code in the lowest bits."""
    draw, low = torch.Generator().manual_seed(bits), -(1 << (bits - 1))
    codes_OI = torch.randint(low, -low, (6, 48), generator=draw).to(torch.int8)
    zero_OG = torch.randint(low, -low, (6, 3), generator=draw).to(torch.int8)  # an odd count
    weight = PackedInt(codes_OI, torch.rand(6, 3, generator=draw), zero_OG, bits)
    stored = olive_packed.encode("x", weight)

    def packed(row: list[int]) -> list[int]:
        stream = sum((code - low) << (bits * i) for i, code in enumerate(row))
        return list(stream.to_bytes(-(-len(row) * bits // 8), "little"))

    assert stored["x.qweight"].tolist() == [packed(row) for row in codes_OI.tolist()]
    assert stored["x.qzeros"].tolist() == [packed(row) for row in zero_OG.tolist()]
    spec = QuantSpec(bits=bits, group_size=16, symmetric=False)
    for role, (shape, dtype) in olive_packed.parts(spec, (6, 48), torch.float32).items():
        assert stored[f"x.{role}"].shape == shape
        assert stored[f"x.{role}"].dtype is dtype
    again = olive_packed.decode(stored, "x", spec)
    assert torch.equal(again.codes_OI, codes_OI)
    assert again.zero_OG is not None
    assert torch.equal(again.zero_OG, zero_OG)
