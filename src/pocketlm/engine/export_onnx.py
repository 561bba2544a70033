"""Makes an ONNX directory of one in the layout of `formats.onnx`, by ONNX Runtime GenAI's builder.

The builder runs in an environment of its own. What it wrote is not believed: every product of codes
is read back from the file, decoded, and must give the values of the model's own weights bit for
bit; nothing else may be quantized.

Legend: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.errors import (
    ArtifactError,
    ConfigError,
    EngineMissing,
    UnsupportedLayer,
    UnsupportedModel,
)
from pocketlm.core.programs import find_program
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.engine.conversion import Conversion, convert
from pocketlm.formats.capabilities import is_expert
from pocketlm.formats.layouts import olive_packed
from pocketlm.models.packed import PackedSource
from pocketlm.models.stored import StoredModel

NAME = "onnx"
OTHERS = "--to gguf, dense and compressed-tensors do not need it."
BUILDER = "the model builder of ONNX Runtime GenAI"
PYTHON = "POCKETLM_ONNX_PYTHON"  # environment variable
SCRIPT = Path(__file__).with_name("scripts") / "build_onnx.py"
NOT_INSTALLED = 3  # its exit code
INSTALL = (
    "Install it in an environment of its own: `python -m venv onnx-env; onnx-env/bin/pip install "
    "onnxruntime-genai onnxruntime onnx onnx_ir torch transformers`; then give --engine-python "
    f"onnx-env/bin/python, or set {PYTHON}."
)
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Sums in float32; by default the builder has activations rounded to 8 bits.
OPTIONS = ("accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather")
TOGETHER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PLACE = re.compile(r"layers[./](\d+)[./].*?([a-z_]+_proj)(?:[./]MatMulNBits)?$")


@dataclass(frozen=True)
class Built:
    """An ONNX directory.

    Attributes:
        versions: Package → release, of what built it.
        opsets: Domain → version.
        bytes_stored: Of the graph and its tensors.
    """

    versions: Mapping[str, str]
    opsets: Mapping[str, int]
    bytes_stored: int

    def notes(self) -> list[str]:
        """What there is to be told."""
        opsets = ", ".join(f"{domain} {version}" for domain, version in self.opsets.items())
        return [
            f"opsets {opsets}; built by onnxruntime-genai {self.versions['onnxruntime-genai']}.",
            "embedding, head and norms are float32 in the file.",
        ]


def find_builder(python: str | Path | None) -> str:
    """The Python that has the builder: as asked, what the environment variable says, or this one.

    Raises:
        EngineMissing: If there is no such program.
    """
    asked = python or os.environ.get(PYTHON) or sys.executable
    found = find_program(asked)
    if found is None:
        where = PYTHON if python is None else "--engine-python"
        raise EngineMissing(f"'{asked}' is no program.", where=where, remedy=INSTALL)
    check = "import onnxruntime_genai, onnx, onnx_ir, torch, transformers"
    tried = subprocess.run([found, "-c", check], capture_output=True, text=True, check=False)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise EngineMissing(
            f"--to onnx needs ONNX Runtime GenAI ({said}).", where=found, remedy=INSTALL
        )
    return found


def convert_whole(model: StoredModel) -> Conversion:
    """Plans the directory that the builder reads; it takes no block of which a part stays dense.

    Raises:
        ConfigError: If nothing is compressed.
        UnsupportedLayer: If there are experts, or a linear cannot be a product of codes there: the
            remedy decodes all then.
    """
    if model.packed is None:
        raise ConfigError(
            "holds no codes that could be kept.",
            where=str(model.path),
            remedy="Compress it first, or give --dtype float32.",
        )
    experts = [*filter(is_expert, model.packed.forms())]
    if experts:
        raise UnsupportedLayer(f"{BUILDER} reads no experts.", where=experts[0], remedy=OTHERS)
    try:
        # The builder adds 1 to the norms of Gemma in the dtype that it finds.
        made = convert(model, NAME, None, vectors=torch.float32)
        for module in made.specs:
            if _PLACE.search(module) is None:
                raise UnsupportedLayer(f"{BUILDER} reads no codes of such a layer.", where=module)
            if module.rpartition(".")[2] in TOGETHER:  # seen in 0.18.0
                raise UnsupportedLayer(
                    f"is a joined linear, whose zero points {BUILDER} splits wrongly.", where=module
                )
        kept = [module for module in made.ignored if _PLACE.search(module)]
        if kept:
            raise UnsupportedLayer(
                f"is not compressed, and {BUILDER} wants a block's linears alike.", where=kept[0]
            )
    except UnsupportedLayer as error:
        remedy = "Export with --to onnx --dtype float32: every weight is decoded."
        raise UnsupportedLayer(error.what, where=error.where, remedy=remedy) from None
    return made


def build(python: str, source: Path, output: Path, made: Conversion | None) -> Built:
    """Builds the directory and compares its codes with the model's.

    Args:
        python: What `find_builder` found.
        source: In the layout of `formats.onnx`, or dense.
        output: What is made.
        made: What `source` holds; None: dense weights in float32.

    Raises:
        UnsupportedModel: If the builder refuses the model, with its words.
        ArtifactError: If the file holds other weights than the model.
    """
    answer = output.with_name("answer.json")
    options = () if made is None else (*OPTIONS, f"fuse_qkv={_fusible(made.specs)}")
    precision = "fp32" if made is None else "int4"
    ended = subprocess.run(
        [python, str(SCRIPT), str(source), str(output), precision, str(answer), *options],
        capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, **QUIET},
    )  # fmt: skip
    if ended.returncode or not answer.is_file():
        said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][-500:]
        if ended.returncode == NOT_INSTALLED:
            raise EngineMissing(said, where=python, remedy=INSTALL)
        raise UnsupportedModel(
            f"{BUILDER} refuses it: {said.rstrip('.')}.",
            where="--to onnx",
            remedy=OTHERS,
        )
    found = json.loads(answer.read_text("utf-8"))
    _compare(found["products"], output, {} if made is None else made.specs, made and made.source)
    size = sum(file.stat().st_size for file in output.glob("model.onnx*"))
    return Built(found["versions"], found["opsets"], size)


def _fusible(specs: Mapping[str, QuantSpec]) -> bool:
    """Whether the builder can join query, key and value: it wants one grid for the three."""
    grids: dict[str, set[QuantSpec]] = defaultdict(set)
    for module, spec in specs.items():
        parent, _, leaf = module.rpartition(".")
        if leaf in TOGETHER["qkv_proj"]:
            grids[parent].add(spec)
    return all(len(found) == 1 for found in grids.values())


def _compare(
    products: Iterable[Mapping[str, Any]],
    directory: Path,
    specs: Mapping[str, QuantSpec],
    source: PackedSource | None,
) -> None:
    """Every product's weight is the model's, bit for bit, and every weight is in a product.

    Raises:
        ArtifactError: With the first that is not.
    """
    theirs: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for product in products:
        layer, leaf = _place(product["name"])
        if product["kind"] != "MatMulNBits":
            raise ArtifactError("the builder quantized it anew.", where=product["name"])
        theirs[layer, _joined(leaf)][leaf] = product
    ours: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for module in specs:
        layer, leaf = _place(module)
        ours[layer, _joined(leaf)][leaf] = module
    for place in ours.keys() ^ theirs.keys():
        raise ArtifactError(
            f"block {place[0]} has {place[1]} " + ("no more." if place in ours else "unasked."),
            where="model.onnx",
        )
    for place, modules in ours.items():
        assert source is not None
        mine = [source.packed(f"{modules[leaf]}.weight") for leaf in _ordered(modules)]
        found = [_decoded(theirs[place][leaf], directory) for leaf in _ordered(theirs[place])]
        rows = torch.cat([weight.dequantize() for weight in mine])
        if not torch.equal(rows, torch.cat([weight.dequantize() for weight in found])):
            raise ArtifactError(
                "the built file holds other values.", where=next(iter(modules.values()))
            )


def _place(name: str) -> tuple[int, str]:
    """Block and leaf of a module path, or of a node of the graph."""
    found = _PLACE.search(name)
    if found is None:
        raise ArtifactError("is quantized in the built file, and not in the model.", where=name)
    return int(found[1]), found[2]


def _joined(leaf: str) -> str:
    return next((whole for whole, parts in TOGETHER.items() if leaf in parts), leaf)


def _ordered(leaves: Iterable[str]) -> list[str]:
    """Leaves in the order in which their rows lie in the joined product."""
    order = [part for parts in TOGETHER.values() for part in parts]
    return sorted(leaves, key=lambda leaf: order.index(leaf) if leaf in order else 0)


def _decoded(product: Mapping[str, Any], directory: Path) -> PackedInt:
    """The weight of a product as the file has it."""
    bits, block, rows, columns = (product[key] for key in ("bits", "block_size", "N", "K"))
    spec = QuantSpec(bits=bits, group_size=block, symmetric=False)
    tensors = {
        f"{product['name']}.{role}": _read(directory, product["parts"][role], dtype, (rows, -1))
        for role, dtype in (
            ("qweight", torch.uint8), ("scales", torch.float32), ("qzeros", torch.uint8)
        )
    }  # fmt: skip
    weight = olive_packed.decode(tensors, product["name"], spec)
    if weight.shape != (rows, columns):
        raise ArtifactError(f"is {weight.shape}, not {(rows, columns)}.", where=product["name"])
    return weight


def _read(
    directory: Path, place: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, int]
) -> Tensor:
    with (directory / Path(place["file"]).name).open("rb") as file:
        file.seek(place["offset"])
        raw = bytearray(file.read(place["bytes"]))
    return torch.frombuffer(raw, dtype=dtype).view(shape)
