"""Writes an artifact again in another form, tensor by tensor, and says what that costs.

``gguf`` is one file for llama.cpp (`engine/export_gguf.py`).

``dense`` undoes every compression of the storage: codes are decoded, factors multiplied, zeros
written out. What comes out is an ordinary checkpoint that any tool loads; what was lost when it was
compressed stays lost, and what was gained in bytes and speed is given back.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from pocketlm.core.errors import ConfigError, OutputBusy, nearest
from pocketlm.core.state import LinearStep
from pocketlm.core.stored import LowRankSpec, SumSpec
from pocketlm.core.views import TensorInfo
from pocketlm.engine.artifact import CARD, partial_path
from pocketlm.engine.export_gguf import WrittenTensor, write
from pocketlm.formats.gguf_mix import require_mix
from pocketlm.formats.read import CompressedIndex
from pocketlm.formats.safetensors_header import element_bytes
from pocketlm.formats.shards import Entry, assemble, sync_directory, write_file
from pocketlm.models.config import read_config
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.stream import SafetensorsSource
from pocketlm.models.tokenizer import side_files

CHUNK_BYTES = 16 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Export(BaseModel):
    """What an export made, and what it cost.

    Attributes:
        output: The directory.
        form: What was asked for.
        dtype: Of the decoded weights.
        decoded: Linears that were decoded.
        bytes_before: Of the artifact's tensors.
        bytes_after: Of the exported tensors.
        products_before: Multiplications a token in the decoded linears, in the artifact.
        products_after: The same now.
        notes: What else changed, as sentences.
        tensors: What became of each tensor of a GGUF file; empty for other forms.
    """

    model_config = ConfigDict(extra="forbid")

    output: Path
    form: str
    dtype: str
    decoded: int
    bytes_before: int
    bytes_after: int
    products_before: int
    products_after: int
    notes: list[str]
    tensors: dict[str, WrittenTensor] = Field(default_factory=dict)


def export(
    directory: Path,
    output: Path,
    form: str = "dense",
    dtype: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    steps: Sequence[LinearStep] = (),
) -> Export:
    """Writes an artifact in another form; the output takes its name once it is whole.

    Args:
        directory: The artifact.
        output: Where the exported model goes; must not be there, or be empty.
        form: "dense", "gguf", or "gguf:" and a mixture of types such as Q4_K_M.
        dtype: Of decoded weights, "bfloat16", "float16" or "float32"; None: the artifact's.
        on_progress: Called with bytes written and bytes in all.
        steps: What rounds values to a GGUF type: linear steps that need no data.

    Returns:
        What was made, with its price.

    Raises:
        ConfigError: If the form or dtype is none there is, or nothing is compressed.
        OutputBusy: If something lies at the output.
        ArtifactError: If a weight's tensors contradict each other.
        ResourceError: If the disk is full.
    """
    name, _, mix = form.partition(":")
    if name not in FORMS or (mix and name != "gguf"):
        raise ConfigError(
            f"there is no export to '{form}'.", where="--to", remedy=nearest(name, FORMS)
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"weights are not written in '{dtype}'.", where="--dtype", remedy=nearest(dtype, DTYPES)
        )
    if name == "gguf":
        return _gguf(directory, output, mix, dtype, on_progress, steps)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputBusy(
            "is not empty.", where=str(output), remedy="Give another -o; nothing is replaced."
        )
    return _dense(directory, output, dtype, on_progress)


def _gguf(
    source: Path,
    output: Path,
    mix: str,
    dtype: str | None,
    on_progress: Callable[[int, int], None] | None,
    steps: Sequence[LinearStep],
) -> Export:
    asked = require_mix(mix) if mix else None
    if output.is_dir():
        output = output / f"{source.name.removesuffix('.gguf')}-{asked or 'held'}.gguf"
    if output.exists():
        raise OutputBusy(
            "is there already.", where=str(output), remedy="Give another -o; nothing is replaced."
        )
    if output.suffix != ".gguf":
        raise ConfigError(
            "a GGUF file ends in .gguf.", where=str(output), remedy=f"Give -o {output}.gguf."
        )
    made = write(source, output, asked, dtype, steps, on_progress)
    kept = sum(tensor.kept for tensor in made.tensors.values())
    return Export(
        output=output,
        form=f"gguf:{asked}" if asked else "gguf",
        dtype=dtype or "as stored",
        decoded=len(made.tensors) - kept,
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        products_before=0,
        products_after=0,
        notes=made.notes,
        tensors=dict(made.tensors),
    )


def _dense(
    directory: Path,
    output: Path,
    dtype: str | None,
    on_progress: Callable[[int, int], None] | None,
) -> Export:
    config, stored = read_config(directory), SafetensorsSource(directory)
    index = CompressedIndex.build(config, stored.infos())
    if index is None:
        raise ConfigError(
            "is dense already: nothing in it is compressed.",
            where=str(directory),
            remedy="Copy it, or give an artifact of `pocketlm compress`.",
        )
    source = DecodedSource(stored, index)
    name = dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    target = DTYPES.get(name, torch.bfloat16)
    decoded = {index.modules[module].tensor_name: module for module in index.modules}
    growing = partial_path(output)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    try:
        entries = [_entry(source, info, target, info.name in decoded) for info in _infos(source)]
        assemble(growing, entries, on_progress=on_progress)
        for file, data in sorted(side_files(directory).items()):
            if file != CARD:  # it speaks of the compressed model
                (growing / file).parent.mkdir(parents=True, exist_ok=True)
                write_file(growing / file, data)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        plain.pop("torch_dtype", None)
        plain["dtype"] = str(target).removeprefix("torch.")
        write_file(growing / "config.json", _json(plain))
        account = _account(index, source, stored, output, target, len(decoded), entries)
        (growing / "pocketlm").mkdir()
        account_json = {**account.model_dump(mode="json"), "source": str(directory)}
        write_file(growing / "pocketlm" / "export.json", _json(account_json))
        if output.exists():
            output.rmdir()
        growing.replace(output)
        sync_directory(output.parent)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
        stored.close()
    return account


def _infos(source: DecodedSource) -> list[TensorInfo]:
    return list(source.infos().values())


def _entry(source: DecodedSource, info: TensorInfo, dtype: torch.dtype, decoded: bool) -> Entry:
    """A decoded weight in `dtype`, anything else as it is stored."""
    if not decoded:
        return Entry(
            info.name, info.dtype, info.shape, lambda: source.chunks(info.name, CHUNK_BYTES)
        )

    def chunks() -> Iterator[bytes | memoryview]:
        values = source.read(info.name).to(dtype).contiguous().view(-1)
        each = CHUNK_BYTES // values.element_size()
        for start in range(0, values.numel(), each):
            yield values[start : start + each].view(torch.uint8).numpy().data

    return Entry(info.name, dtype, info.shape, chunks)


def _account(
    index: CompressedIndex,
    source: DecodedSource,
    stored: SafetensorsSource,
    output: Path,
    dtype: torch.dtype,
    decoded: int,
    entries: list[Entry],
) -> Export:
    before = after = factorised = 0
    for module in index.modules.values():
        shape = source.infos()[module.tensor_name].shape
        dense = math.prod(shape)
        after += dense
        if isinstance(module.spec, LowRankSpec):
            before += module.spec.rank * sum(shape)
        elif isinstance(module.spec, SumSpec):
            before += dense + module.spec.low.rank * sum(shape)
        else:
            before += dense
        factorised += isinstance(module.spec, LowRankSpec | SumSpec)
    name = str(dtype).removeprefix("torch.")
    notes = [f"{decoded} linears decoded in float32 and rounded once, to {name}."]
    if factorised:
        notes.append(
            f"{factorised} factorised linears run as one product again: {after / before:.2f} times "
            "the multiplications of the decoded linears."
        )
    rounded = source.quantizers()
    if rounded:
        notes.append(f"the inputs of {len(rounded)} linears are not rounded any more.")
    return Export(
        output=output,
        form="dense",
        dtype=name,
        decoded=decoded,
        bytes_before=sum(info.bytes_stored for info in stored.infos().values()),
        bytes_after=sum(math.prod(e.shape) * element_bytes(e.dtype) for e in entries),
        products_before=before,
        products_after=after,
        notes=notes,
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


FORMS = ("dense", "gguf")
"""What `--to` takes; other formats join here."""
