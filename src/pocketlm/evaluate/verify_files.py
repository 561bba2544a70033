"""The checks of `verify` that need no model: files, headers, codes, the ledger's accounts."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import Recipe
from pocketlm.core.stored import DenseSpec
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.formats.layouts import pack_quantized
from pocketlm.formats.onnx import GENAI_CONFIG
from pocketlm.formats.packing import padding_is_zero
from pocketlm.formats.pocketlm import shortcuts_of
from pocketlm.formats.read import CompressedIndex, CompressedModule
from pocketlm.formats.safetensors_header import StoredTensor, read_header
from pocketlm.formats.shards import INDEX, PARTIAL, SINGLE
from pocketlm.models import open_model
from pocketlm.models.tokenizer import load_tokenizer

LEDGER = "pocketlm/ledger.json"
STAGES = "pocketlm/stages"  # ledgers of the stages before the last; the first is the source's
RECIPE = "pocketlm/recipe.yaml"
AGAIN = "Run the same compress command again; it resumes."

CheckFunction = Callable[["Artifact"], str]
Named = tuple[str, tuple[str, ...], CheckFunction]
"""A check: its name, the checks it builds on, and its function."""


class NotChecked(Exception):
    """A check could not be made; the text says why and how to have it made."""


@dataclass
class Artifact:
    """What the checks have found out so far; each fills in what later ones need.

    Attributes:
        path: The directory.
        config: config.json.
        ledger: The accounts.
        tensors: Tensor name → (file, place).
        index: What is compressed and not an ordinary tensor.
        bits: Tensor of the source → stored bits of its compressed weight, counted as it decodes.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    tensors: dict[str, tuple[Path, StoredTensor]] = field(default_factory=dict)
    index: CompressedIndex | None = None
    bits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Looks whether there is anything to check.

        Raises:
            ArtifactError: If the path is no directory or holds nothing of an artifact.
        """
        if not path.is_dir():
            raise ArtifactError(
                "is no directory.",
                where=str(path),
                remedy="Give the directory that compress wrote.",
            )
        if (path / GENAI_CONFIG).is_file():
            raise ArtifactError(
                "is a directory of ONNX Runtime GenAI, which is written here and not read again.",
                where=str(path),
                remedy="Verify what it was made of: --engine onnxruntime exports that anew.",
            )
        traces = [path / "config.json", path / LEDGER, *path.glob("*.safetensors")]
        if not any(trace.exists() for trace in traces):
            raise ArtifactError(
                "holds no config.json, no ledger and no safetensors file.",
                where=str(path),
                remedy="Give the directory that compress wrote.",
            )
        return cls(path)

    def require_ledger(self) -> Ledger:
        """The ledger, after its check has passed."""
        if self.ledger is None:
            raise NotChecked("needs the ledger.")
        return self.ledger

    def read(self, name: str) -> Tensor:
        """A stored tensor."""
        path, place = self.tensors[name]
        with path.open("rb") as file:
            file.seek(place.start)
            data = bytearray(file.read(place.bytes_stored))
        if not data:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)

    def digest(self, name: str) -> str:
        """sha256 of a stored tensor's bytes."""
        path, place = self.tensors[name]
        with path.open("rb") as file:
            file.seek(place.start)
            return hashlib.sha256(file.read(place.bytes_stored)).hexdigest()


def checks(
    against_source: Path | str | None,
) -> tuple[Named, ...]:
    """Name, the checks it builds on, and function of each, in order.

    Args:
        against_source: The model the artifact was made from, if it is to be compared.
    """
    return (
        ("config.json", (), check_config),
        ("ledger", (), check_ledger),
        ("files", ("ledger",), check_files),
        ("shards", (), check_shards),
        ("compressed weights", ("config.json", "shards"), check_compressed),
        ("accounts", ("ledger", "shards", "compressed weights"), check_accounts),
        ("source tensors", ("ledger",), lambda artifact: check_source(artifact, against_source)),
        ("bits per weight", ("accounts",), check_bits),
        ("tied weights", ("config.json", "shards"), check_tied),
        ("tokenizer", ("ledger",), check_tokenizer),
        ("recipe", (), check_recipe),
    )


def check_config(artifact: Artifact) -> str:
    """config.json is there (it is written last) and tells how compressed weights are stored."""
    path = artifact.path / "config.json"
    if not path.is_file():
        raise ArtifactError(
            "config.json is missing; it is written last, so the artifact is incomplete.",
            remedy=AGAIN,
        )
    config = json.loads(path.read_text("utf-8"))
    if not isinstance(config, dict):
        raise ArtifactError("config.json is no JSON object.", remedy=AGAIN)
    artifact.config = config
    if "quantization_config" not in config:
        return "no quantization_config: an ordinary checkpoint."
    added = len(shortcuts_of(config))
    between = f", {added} matrices between blocks" if added else ""
    return f"quant_method {config['quantization_config'].get('quant_method')}{between}."


def check_ledger(artifact: Artifact) -> str:
    """The ledger is there and valid."""
    path = artifact.path / LEDGER
    if not path.is_file():
        raise ArtifactError(
            f"{LEDGER} is missing: no result of pocketlm, or no longer whole.",
            remedy=f"Of any other model --engine tells whether it runs. Else: {AGAIN}",
        )
    artifact.ledger = Ledger.model_validate_json(path.read_text("utf-8"))
    packed = artifact.ledger.format != "dense"
    if packed and artifact.config and "quantization_config" not in artifact.config:
        raise ArtifactError(
            f"is in the format {artifact.ledger.format}, but config.json has no "
            "quantization_config.",
            remedy=AGAIN,
        )
    return f"{len(artifact.ledger.tensors)} tensors, {len(artifact.ledger.files)} files."


def check_files(artifact: Artifact) -> str:
    """Every file of the ledger is there with the same hash; no unfinished or foreign weights."""
    files = artifact.require_ledger().files
    for name, expected in files.items():
        path = artifact.path / name
        if not path.is_file():
            raise ArtifactError("is missing.", where=name, remedy=AGAIN)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ArtifactError(
                f"was changed or damaged: its sha256 is {found[:12]}…, not {expected[:12]}…, "
                f"at {path.stat().st_size:,} bytes.",
                where=name,
                remedy="Copy it again from the original, or compress again.",
            )
    for path in sorted(artifact.path.iterdir()):
        foreign = path.suffix in (".safetensors", ".bin") and path.name not in files
        if foreign or path.name.endswith(PARTIAL):
            raise ArtifactError(
                "is no file of the ledger, but could be loaded with it.",
                where=path.name,
                remedy="Remove it.",
            )
    return f"{len(files)} files have the hashes of the ledger."


def check_shards(artifact: Artifact) -> str:
    """Headers are sound, and the index and the files name the same tensors."""
    present = {path.name for path in artifact.path.glob("*.safetensors")}
    weight_map: Mapping[str, str] = {}
    total_bytes: int | None = None
    if (artifact.path / INDEX).is_file():
        index = json.loads((artifact.path / INDEX).read_text("utf-8"))
        weight_map, total_bytes = index["weight_map"], index["metadata"]["total_size"]
    elif present != {SINGLE}:
        raise ArtifactError(f"neither {SINGLE} alone nor {INDEX} is there.", remedy=AGAIN)
    named = set(weight_map.values()) or {SINGLE}
    for name in sorted(named ^ present):
        what = "is missing" if name in named else "is no shard of the index"
        raise ArtifactError(f"{what}.", where=name, remedy=AGAIN)
    artifact.tensors.clear()
    for name in sorted(present):
        path = artifact.path / name
        for tensor, place in read_header(path).items():
            if tensor in artifact.tensors:
                raise ArtifactError("lies in two shards.", where=tensor)
            if weight_map and weight_map.get(tensor) != name:
                raise ArtifactError(f"lies in {name}, but not by the index.", where=tensor)
            artifact.tensors[tensor] = (path, place)
    for tensor in sorted(set(weight_map) - set(artifact.tensors)):
        raise ArtifactError("is in the index, but in no shard.", where=tensor)
    stored = sum(place.bytes_stored for _, place in artifact.tensors.values())
    if total_bytes is not None and total_bytes != stored:
        raise ArtifactError(f"total_size is {total_bytes}, the shards hold {stored}.", where=INDEX)
    return f"{len(artifact.tensors)} tensors, {stored:,} bytes, in {len(present)} files."


def check_compressed(artifact: Artifact) -> str:
    """Every compressed linear decodes and is as sparse as the ledger says; padding is zero."""
    index = CompressedIndex.build(artifact.config, artifact.tensors)
    artifact.index = index
    entries = {} if artifact.ledger is None else artifact.ledger.compressed()
    if index is None and not entries:
        if artifact.ledger is not None and artifact.ledger.stages:
            return "no weight is: the model is smaller, and an ordinary checkpoint."
        if artifact.ledger is None:  # an export, or another tool's model
            return "no weight is: an ordinary checkpoint."
        raise ArtifactError("nothing is compressed.")
    for module in index.modules.values() if index is not None else ():
        assert index is not None
        packed = index.decode(module.name, artifact.read)
        if not packed.is_finite:
            raise ArtifactError("a scale or code is not finite.", where=module.name)
        if module.layout is pack_quantized:
            words_OW = artifact.read(f"{module.name}.weight_packed")
            if not padding_is_zero(words_OW, module.spec.bits, packed.shape[1]):
                raise ArtifactError("the padding of a packed row is not zero.", where=module.name)
        index.quantizer(module.name, artifact.read)  # refuses a static scale that is unusable
        _check_shape(artifact, module, packed.shape)
        _check_zeros(module.name, packed.dequantize(), entries.get(module.tensor_name))
        artifact.bits[module.tensor_name] = packed.stored_bits
    for name in [
        name for name in entries if name in artifact.tensors and name not in artifact.bits
    ]:
        _check_zeros(name, artifact.read(name), entries[name])
    if not entries and not artifact.bits:
        return "no weight is: the model is smaller, its blocks in bases of their own."
    return f"{len(entries) or len(artifact.bits)} linears decode{_sparsity(entries)}."


def _check_zeros(where: str, weight: Tensor, entry: Entry | None) -> None:
    """A pruned weight has at least the zeros that the ledger tells of."""
    if entry is None or entry.sparsity is None:
        return
    zeros, told = int((weight == 0).sum()), round(entry.sparsity * weight.numel())
    if zeros < told:
        raise ArtifactError(f"has {zeros} zeros, in the ledger {told}.", where=where)


def _sparsity(entries: Mapping[str, Entry]) -> str:
    pruned = [e for e in entries.values() if e.sparsity is not None]
    if not pruned:
        return ""
    weights = [math.prod(entry.shape) for entry in pruned]
    zeros = sum((e.sparsity or 0.0) * n for e, n in zip(pruned, weights, strict=True))
    return f", {100 * zeros / sum(weights):.2f} % of their weights pruned"


def _check_shape(artifact: Artifact, module: CompressedModule, shape: tuple[int, int]) -> None:
    rows, columns = shape
    expected = (columns, rows) if module.transposed else (rows, columns)
    if artifact.ledger is None or module.tensor_name not in artifact.ledger.tensors:
        return
    recorded = artifact.ledger.tensors[module.tensor_name].shape
    if recorded != expected:
        raise ArtifactError(f"is {expected}, in the source {recorded}.", where=module.name)


def check_accounts(artifact: Artifact) -> str:
    """Each stored tensor stands for one tensor of the source, of the same shape or format."""
    entries = artifact.require_ledger().tensors
    outputs = Counter(output for entry in entries.values() for output in entry.outputs)
    for name in sorted(set(outputs) ^ set(artifact.tensors)):
        what = "not stored" if name in outputs else "stored, but not explained by the ledger"
        raise ArtifactError(f"is {what}.", where=name)
    for name, count in outputs.items():
        if count > 1:
            raise ArtifactError(f"stands for {count} tensors of the source.", where=name)
    grids = {} if artifact.index is None else artifact.index.modules
    for name, entry in entries.items():
        module = grids.get(name.removesuffix(".weight"))
        packed = entry.spec is not None and not isinstance(entry.spec, DenseSpec)
        if packed != (module is not None):
            raise ArtifactError(f"is '{entry.action}' in the ledger only.", where=name)
        if module is not None and entry.spec != module.spec:
            raise ArtifactError(f"is {module.spec!r}, in the ledger {entry.spec!r}.", where=name)
        if module is not None and entry.activations != module.activations:
            raise ArtifactError(
                f"rounds inputs as {module.activations!r}, in the ledger {entry.activations!r}.",
                where=name,
            )
        if entry.action == "dropped" and entry.outputs:
            raise ArtifactError("was dropped, yet has outputs.", where=name)
        same = entry.action in ("kept", "folded") or isinstance(entry.spec, DenseSpec)
        if same and artifact.tensors[entry.outputs[0]][1].shape != entry.shape:
            raise ArtifactError("has another shape than in the source.", where=name)
    kinds = Counter(entry.action for entry in entries.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + "."


def check_source(artifact: Artifact, source: Path | str | None) -> str:
    """The ledger explains every tensor of the source, and nothing else."""
    if source is None:
        raise NotChecked("give --against SOURCE to have its tensors compared.")
    infos = open_model(source).source.infos()
    first = min(artifact.path.glob(f"{STAGES}/1-*.json"), default=None)
    ledger = artifact.require_ledger()
    if first is not None:
        ledger = Ledger.model_validate_json(first.read_text("utf-8"))
    entries = ledger.tensors
    entries = {n: e for n, e in entries.items() if n in infos or e.copy_of not in infos}
    for name in sorted(set(infos) ^ set(entries)):
        what = "not explained by the ledger" if name in infos else "no tensor of the source"
        raise ArtifactError(f"is {what}.", where=name)
    for name, entry in entries.items():
        if entry.shape != tuple(infos[name].shape):
            raise ArtifactError(f"is {infos[name].shape}, not {entry.shape}.", where=name)
    return f"all {len(infos)} tensors of the source are explained."


def check_bits(artifact: Artifact) -> str:
    """Bits are counted again, from what is stored, and are the ledger's."""
    grids = {} if artifact.index is None else artifact.index.modules
    bits_total = weights = 0
    for name, entry in artifact.require_ledger().tensors.items():
        module = grids.get(name.removesuffix(".weight"))
        if module is None:
            found = sum(8 * artifact.tensors[output][1].bytes_stored for output in entry.outputs)
        else:
            inputs = 0 if module.activations is None else module.activations.stored_bits
            found = artifact.bits[name] + inputs
        if entry.spec is not None:
            bits_total, weights = bits_total + found, weights + math.prod(entry.shape)
        if found != entry.bits:
            raise ArtifactError(f"takes {found} bits, in the ledger {entry.bits}.", where=name)
    if not weights:
        return "every tensor takes what the ledger says; no weight is compressed."
    return f"{bits_total / weights:.4f} bits per compressed weight, scales included."


def check_tied(artifact: Artifact) -> str:
    """Where head and embedding are one tensor, it is stored once."""
    if not artifact.config.get("tie_word_embeddings"):
        return "head and embedding are not tied."
    heads = [n for n in artifact.tensors if n.endswith(("lm_head.weight", "embed_out.weight"))]
    digests = {
        artifact.digest(name): name for name in artifact.tensors if "embed" in name or "wte" in name
    }
    for head in heads:
        twin = digests.get(artifact.digest(head))
        if twin is not None and twin != head:
            raise ArtifactError(f"repeats '{twin}', though both are tied.", where=head)
    return "stored once."


def check_tokenizer(artifact: Artifact) -> str:
    """The tokenizer loads, and has the chat template that came with it."""
    files = artifact.require_ledger().files
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "tekken")) for name in files):
        raise NotChecked("the source came without a tokenizer.")
    tokenizer = load_tokenizer(artifact.path)
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        settings = json.loads((artifact.path / "tokenizer_config.json").read_text("utf-8"))
    templated = "chat_template" in settings or any(n.startswith("chat_template") for n in files)
    if templated and not tokenizer.chat_template:
        raise ArtifactError("the chat template is not loaded.", where="tokenizer")
    return f"{len(tokenizer)} tokens, {'with' if templated else 'without'} a chat template."


def check_recipe(artifact: Artifact) -> str:
    """The resolved recipe can be run again."""
    path = artifact.path / RECIPE
    if not path.is_file():
        raise ArtifactError(f"{RECIPE} is missing.", remedy=AGAIN)
    recipe = Recipe.parse(yaml.safe_load(path.read_text("utf-8")), where=RECIPE)
    return " → ".join(step.method for step in recipe.steps) + "."
