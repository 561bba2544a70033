"""Builds an ONNX directory: ``python build_onnx.py SOURCE OUTPUT PRECISION ANSWER [KEY=VALUE …]``.

It runs in an environment that has ONNX Runtime GenAI, whose model builder does the work, and
imports nothing of pocketlm. ANSWER, a JSON file, tells what lies where in the output: versions,
opsets, and each product of codes with the place of its tensors.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3  # exit code where a package is not there
IMPORTED = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers")
PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx", "transformers")
ROLES = ("qweight", "scales", "qzeros")  # inputs of MatMulNBits behind the activations
QUANTIZED = ("MatMulNBits", "GatherBlockQuantized", "QMoE")


def build(source: str, output: str, precision: str, options: list[str]) -> None:
    """Runs the builder by its command line, for a CPU; it holds the whole model in memory."""
    sys.argv = [
        "builder", "--model_name", source, "--input", source, "--output", output,
        "--precision", precision, "--execution_provider", "cpu", "--cache_dir", f"{output}.cache",
        "--extra_options", "hf_token=false", *options,
    ]  # fmt: skip
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def describe(output: Path) -> dict[str, Any]:
    """What was built."""
    import onnx  # pyright: ignore[reportMissingImports]

    model = onnx.load(output / "model.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "opsets": {each.domain or "ai.onnx": each.version for each in model.opset_import},
        "products": [
            {"name": node.name, "kind": node.op_type, "parts": _parts(node, tensors),
             **{each.name: each.i for each in node.attribute}}
            for node in model.graph.node if node.op_type in QUANTIZED
        ],
    }  # fmt: skip


def _parts(node: Any, tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for role, name in zip(ROLES, node.input[1:], strict=False):
        if name in tensors:
            place = {entry.key: entry.value for entry in tensors[name].external_data}
            found[role] = {
                "file": place["location"], "offset": int(place.get("offset", 0)),
                "bytes": int(place["length"]),
            }  # fmt: skip
    return found


if __name__ == "__main__":
    source, output, precision, answer, *options = sys.argv[1:]
    try:
        for name in IMPORTED:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    build(source, output, precision, options)
    Path(answer).write_text(json.dumps(describe(Path(output))), encoding="utf-8")
