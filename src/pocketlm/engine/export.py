"""Writes a compressed model again in another form, tensor by tensor, and says what that costs.

``gguf`` is one file for llama.cpp (`engine/export_gguf.py`), ``onnx`` a directory that ONNX Runtime
GenAI's own builder makes of one in its layout (`engine/export_onnx.py`).

``dense`` undoes every compression of the storage: codes are decoded, factors multiplied, zeros
written out. What comes out is an ordinary checkpoint that any tool loads; what was lost when it was
compressed stays lost, and what was gained in bytes and speed is given back. The other forms keep
the codes (`engine/conversion.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from pocketlm.core.errors import ConfigError, OutputBusy, UnsupportedLayer, nearest
from pocketlm.core.state import LinearStep
from pocketlm.core.stored import LowRankSpec, SumSpec
from pocketlm.core.views import TensorInfo, TensorSource
from pocketlm.engine.artifact import CARD, partial_path
from pocketlm.engine.conversion import CACHE_NOTE, PACKED_FORMS, convert
from pocketlm.engine.export_gguf import WrittenTensor, write
from pocketlm.engine.export_onnx import NAME as ONNX
from pocketlm.engine.export_onnx import Built, build, convert_whole, find_builder
from pocketlm.formats import kv_cache
from pocketlm.formats.capabilities import capability, target_name
from pocketlm.formats.gguf_mix import require_mix
from pocketlm.formats.shards import Entry, assemble, sync_directory, write_file
from pocketlm.models.stored import StoredModel, open_stored

GGUF = "gguf"  # beside `FORMS`: one file, with types of its own
CHUNK_BYTES = 16 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Export(BaseModel):
    """What an export made, and what it cost.

    Attributes:
        output: The directory.
        form: What was asked for.
        dtype: Of the decoded weights; of a GGUF file "by type" or "as stored".
        decoded: Linears that were decoded.
        bytes_before: Of the artifact's tensors.
        bytes_after: Of the exported tensors.
        products_before: Multiplications a token in the decoded linears, in the artifact.
        products_after: The same now.
        notes: What else changed, as sentences.
        tensors: What became of each tensor of a GGUF file; empty for other forms.
        opsets: Domain → version of an ONNX file; empty for other forms.
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
    opsets: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What an export is asked for: form, dtype of decoded weights, engine, a builder's Python."""

    form: str
    dtype: str | None
    target: str | None
    python: str | Path | None = None


@dataclass(frozen=True)
class Made:
    """What an export writes.

    Attributes:
        form: What was asked for.
        dtype: Of the decoded weights; of the model where none is decoded.
        entries: Every tensor.
        decoded: Linears that were decoded.
        config: Gives what config.json says beside the model's own; asked once all is written.
        notes: Gives what changed, as sentences; asked once all is written.
        build: Makes the output (second) of a directory with the entries (first); None: it is that.
    """

    form: str
    dtype: str
    entries: Sequence[Entry]
    decoded: int
    config: Callable[[], dict[str, Any]]
    notes: Callable[[], list[str]]
    build: Callable[[Path, Path], Built] | None = None


def export(
    source: str | Path,
    output: Path,
    form: str = "dense",
    dtype: str | None = None,
    target: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    steps: Sequence[LinearStep] = (),
    engine_python: str | Path | None = None,
) -> Export:
    """Writes a compressed model in another form; the output takes its name once it is whole.

    Args:
        source: An artifact, or what another tool compressed.
        output: Where the exported model goes; must not be there, or be empty.
        form: One of `FORMS`, "gguf", or "gguf:" and a mixture of types such as Q4_K_M.
        dtype: Of decoded weights, "bfloat16", "float16" or "float32"; None: the artifact's.
        target: The engine that is to load it; None: the form's own limits only.
        on_progress: Called with bytes written and bytes in all.
        steps: What rounds values to a GGUF type: linear steps that need no data.
        engine_python: For "onnx", the Python that has ONNX Runtime GenAI; None: what the
            environment variable says, or this one.

    Returns:
        What was made, with its price.

    Raises:
        ConfigError: If the form or dtype is none there is, or nothing is compressed.
        UnsupportedLayer: If its blocks have bases of their own.
        OutputBusy: If something lies at the output.
        UnsupportedLayer: If the form cannot hold a linear, or the target cannot run it.
        ArtifactError: If a weight's tensors contradict each other.
        ResourceError: If the disk is full.
        EngineMissing: If ONNX Runtime GenAI is not installed where it was looked for.
        UnsupportedModel: If its builder refuses the model.
    """
    name, _, mix = form.partition(":")
    if name not in (*FORMS, GGUF) or (mix and name != GGUF):
        raise ConfigError(
            f"there is no export to '{form}'.", where="--to", remedy=nearest(name, (*FORMS, GGUF))
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"weights are not written in '{dtype}'.", where="--dtype", remedy=nearest(dtype, DTYPES)
        )
    if engine_python is not None and name != ONNX:
        raise ConfigError("it is for --to onnx.", where="--engine-python", remedy="Leave it out.")
    if name == GGUF:
        if target is not None and target_name(target) != "llama.cpp":
            _require_target(GGUF, target)
        return _gguf(source, output, mix, dtype, on_progress, steps)
    if output.resolve().is_relative_to(Path(source).resolve()) and Path(source).is_dir():
        raise ConfigError(
            "lies in the model itself.", where=str(output), remedy="Give an -o beside it."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty." if output.is_dir() else "is a file."
        raise OutputBusy(what, where=str(output), remedy="Give another -o; nothing is replaced.")
    if target is not None:
        _require_target(form, target)
    model = open_stored(source)
    try:
        _require_one_basis(model)
        asked = Asked(form, dtype, target, engine_python)
        return _write(model, output, FORMS[form](model, asked), on_progress)
    finally:
        model.close()


def _gguf(
    source: str | Path,
    output: Path,
    mix: str,
    dtype: str | None,
    on_progress: Callable[[int, int], None] | None,
    steps: Sequence[LinearStep],
) -> Export:
    """Writes a GGUF file, of any model, compressed or not."""
    asked = require_mix(mix) if mix else None
    if output.is_dir():
        output = output / f"{Path(source).name.removesuffix('.gguf')}-{asked or 'held'}.gguf"
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
        dtype=dtype or ("by type" if asked else "as stored"),
        decoded=len(made.tensors) - kept,
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        products_before=0,
        products_after=0,
        notes=made.notes,
        tensors=dict(made.tensors),
    )


def _require_target(form: str, target: str) -> None:
    """Refuses a form that an engine does not load at all.

    Raises:
        UnsupportedLayer: With the forms that it does.
        ConfigError: If the target is unknown.
    """
    formats = capability(target).formats
    if form != "dense" and form not in formats:
        readable = ", ".join(dict.fromkeys(name for name in ("dense", *formats) if name in FORMS))
        raise UnsupportedLayer(
            f"{target} does not load {form}.", where="--target", remedy=f"It loads {readable}."
        )


def _require_one_basis(model: StoredModel) -> None:
    """Refuses a model whose blocks have bases of their own.

    Raises:
        UnsupportedLayer: With the first place where one passes to the next.
    """
    if model.shortcuts:
        raise UnsupportedLayer(
            "passes the stream from one block's basis to the next: no ordinary checkpoint can say "
            "that.",
            where=next(iter(model.shortcuts)),
            remedy="Run it by pocketlm.load, or make the model smaller with rotation: shared.",
        )


def _dense(model: StoredModel, asked: Asked) -> Made:
    if model.path.is_dir() and not (model.packed and model.packed.forms()):
        raise ConfigError(
            "is dense already: nothing in it is compressed.",
            where=str(model.path),
            remedy="Copy it, or give an artifact of `pocketlm compress`.",
        )
    return _decoded(model, asked)


def _decoded(model: StoredModel, asked: Asked) -> Made:
    """Every weight whole, whether or not it was compressed."""
    source, forms = model.source, {} if model.packed is None else model.packed.forms()
    name = asked.dtype or str(
        model.config.get("dtype") or model.config.get("torch_dtype") or "bfloat16"
    )
    target = DTYPES.get(name, torch.bfloat16)
    cast = set(forms) or {n for n, i in source.infos().items() if asked.dtype and _is_float(i)}
    dropped = [] if model.kv_cache is None else kv_cache.scales(source.infos())
    infos = [info for info in source.infos().values() if info.name not in dropped]
    entries = [_entry(source, info, target, info.name in cast) for info in infos]
    return Made(
        form="dense",
        dtype=str(target).removeprefix("torch."),
        entries=entries,
        decoded=len(forms),
        config=lambda: {"dtype": str(target).removeprefix("torch.")},
        notes=lambda: _dense_notes(model, target),
    )


def _packed(model: StoredModel, asked: Asked) -> Made:
    if asked.dtype is not None:
        raise ConfigError(
            "weights stay codes in this form; --dtype is that of decoded ones.",
            where="--dtype",
            remedy="Leave it out, or export with --to dense.",
        )
    made = convert(model, asked.form, asked.target)
    return Made(
        form=asked.form,
        dtype=str(model.config.get("dtype") or model.config.get("torch_dtype") or ""),
        entries=made.entries,
        decoded=0,
        config=lambda: {PACKED_FORMS[asked.form]: made.section()},
        notes=lambda: [*made.losses(), *made.notes],
    )


def _onnx(model: StoredModel, asked: Asked) -> Made:
    """Codes as they are; with the dtype float32, every weight decoded."""
    if asked.dtype not in (None, "float32"):
        raise ConfigError(
            "decoded weights of an ONNX directory for a CPU are float32.",
            where="--dtype",
            remedy="Give float32, or leave it out: the codes are kept then.",
        )
    python = find_builder(asked.python)
    if asked.dtype is not None:
        made = _decoded(model, asked)
        return replace(made, form=ONNX, build=lambda source, out: build(python, source, out, None))
    conversion = convert_whole(model)
    return Made(
        form=ONNX,
        dtype="float32",
        entries=conversion.entries,
        decoded=0,
        config=lambda: {"quantization_config": conversion.section()},
        notes=lambda: [*conversion.losses(), *conversion.notes],
        build=lambda source, out: build(python, source, out, conversion),
    )


def _write(
    model: StoredModel, output: Path, made: Made, on_progress: Callable[[int, int], None] | None
) -> Export:
    """Writes all files beside the output and renames the directory once it is whole."""
    growing = partial_path(output)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    try:
        whole = _files(growing / "files", model, made, on_progress)
        account = _account(model, output, made)
        if made.build is not None:
            whole, files = growing / "built", whole
            built = made.build(files, whole)
            _carry(model, files, whole)
            found = {"opsets": dict(built.opsets), "bytes_after": built.bytes_stored}
            account = account.model_copy(update={**found, "notes": account.notes + built.notes()})
        (whole / "pocketlm").mkdir()
        account_json = {**account.model_dump(mode="json"), "source": str(model.path)}
        write_file(whole / "pocketlm" / "export.json", _json(account_json))
        if output.exists():
            output.rmdir()
        whole.replace(output)
        sync_directory(output.parent)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return account


def _files(
    directory: Path,
    model: StoredModel,
    made: Made,
    on_progress: Callable[[int, int], None] | None,
) -> Path:
    """Writes the tensors, config.json and what goes with the model; gives the directory."""
    directory.mkdir()
    assemble(directory, made.entries, on_progress=on_progress)
    for file, data in sorted(model.side_files().items()):
        if file != CARD:  # it speaks of the compressed model
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            write_file(directory / file, data)
    config = {**model.config, **made.config()}
    if "dtype" in config:
        config.pop("torch_dtype", None)
    write_file(directory / "config.json", _json(config))
    return directory


def _carry(model: StoredModel, files: Path, built: Path) -> None:
    """Takes over what a builder leaves behind: licence, generation settings, the plain config."""
    for file in model.side_files():
        if file != CARD and not (built / file).exists():
            (built / file).parent.mkdir(parents=True, exist_ok=True)
            (files / file).replace(built / file)
    write_file(built / "config.json", _json(dict(model.config)))


def _is_float(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point


def _entry(source: TensorSource, info: TensorInfo, dtype: torch.dtype, decoded: bool) -> Entry:
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


def _products(model: StoredModel) -> tuple[int, int, int]:
    """Multiplications a token as stored, with every weight whole, and how many are factorised."""
    before = after = factorised = 0
    for form in ({} if model.packed is None else model.packed.forms()).values():
        dense = math.prod(form.shape)
        after += dense
        if isinstance(form.spec, LowRankSpec):
            before += form.spec.rank * sum(form.shape)
        elif isinstance(form.spec, SumSpec):
            before += dense + form.spec.low.rank * sum(form.shape)
        else:
            before += dense
        factorised += isinstance(form.spec, LowRankSpec | SumSpec)
    return before, after, factorised


def _dense_notes(model: StoredModel, dtype: torch.dtype) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    if model.packed is None:
        return ["what the file holds quantized is decoded to float16, other tensors are as stored."]
    before, after, factorised = _products(model)
    notes = [f"{len(model.packed.forms())} linears decoded in float32 and rounded once, to {name}."]
    if factorised:
        notes.append(
            f"{factorised} factorised linears run as one product again: {after / before:.2f} times "
            "the multiplications of the decoded linears."
        )
    rounded = model.packed.quantizers()
    if rounded:
        notes.append(f"the inputs of {len(rounded)} linears are not rounded any more.")
    if model.kv_cache is not None:
        notes.append(CACHE_NOTE)
    return notes


def _account(model: StoredModel, output: Path, made: Made) -> Export:
    before, after, _ = _products(model)
    return Export(
        output=output,
        form=made.form,
        dtype=made.dtype,
        decoded=made.decoded,
        bytes_before=model.bytes_stored,
        bytes_after=sum(entry.bytes_stored for entry in made.entries),
        products_before=before,
        products_after=after,
        notes=made.notes(),
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


FORMS: dict[str, Callable[[StoredModel, Asked], Made]] = {
    "dense": _dense,
    **dict.fromkeys(PACKED_FORMS, _packed),
    ONNX: _onnx,
}
"""What `--to` takes; other formats join here."""
