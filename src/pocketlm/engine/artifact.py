"""Puts an artifact together: compressed tensors from the work directory, others from the source.

It grows beside its place under a name that starts with a dot and takes its own name in one rename:
a directory of that name is whole. config.json is the last file written before it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from pocketlm.calibration.record import account_of, hashes_file
from pocketlm.calibration.windows import Windows
from pocketlm.core.stored import DenseSpec
from pocketlm.core.views import ModelView, TensorInfo, TensorSource
from pocketlm.engine.ends import SHAPE, EndTask, Pieces, end_tasks, stored_end
from pocketlm.engine.grids import Grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.engine.options import Job
from pocketlm.formats import format_for, pocketlm
from pocketlm.formats.safetensors_header import StoredTensor, read_header
from pocketlm.formats.shards import Entry as ShardEntry
from pocketlm.formats.shards import assemble, sync_directory, write_file
from pocketlm.models.shortcut import REASON

CHUNK_BYTES = 16 << 20
CARD = "README.md"
HASHES = "pocketlm/calibration.npy"


def partial_path(output: Path) -> Path:
    """Where the artifact grows until it is whole."""
    return output.with_name(f".{output.name}.partial")


def write_artifact(
    model: ModelView,
    job: Job,
    grids: Grids,
    windows: Windows | None,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> Ledger:
    """Writes the artifact's files and renames the directory into place.

    Args:
        model: The source.
        job: What was done.
        grids: The grids.
        windows: What was calibrated on; None where no step needed data.
        journal: Holds every block.
        on_progress: Called with bytes written and bytes in all.

    Returns:
        The ledger, as written.

    Raises:
        ArtifactError: If a tensor of the source is not accounted for.
        ResourceError: If the disk is full; finished blocks stay for the next attempt.
    """
    ledger = Ledger(
        source=job.source,
        format=grids.format_name,
        fingerprint=job.fingerprint,
        calibration=None if windows is None else account_of(windows),
        warnings=list(job.warnings),
        stages=list(job.stages),
    )
    entries = list(_shard_entries(model, job, grids, journal, ledger))
    ledger.require_complete(list(model.source.infos()))
    ledger.warnings += ledger.calibration_warnings()
    config = _config(model, grids, ledger)
    side_files = model.side_files()
    write_files(job, side_files, windows, ledger, entries, config, journal.events_path, on_progress)
    return ledger


def write_files(
    job: Job,
    side_files: Mapping[str, bytes],
    windows: Windows | None,
    ledger: Ledger,
    entries: Sequence[ShardEntry],
    config: Mapping[str, Any],
    events: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Writes an artifact whose ledger explains every tensor; adds the files' hashes to the ledger.

    Args:
        job: Where to, and the recipe.
        side_files: Carried over from the source.
        windows: What was calibrated on.
        ledger: Complete but for the files.
        entries: Every tensor.
        config: config.json but for the dtype.
        events: The log of the run.
        on_progress: Called with bytes written and bytes in all.

    Raises:
        ResourceError: If the disk is full.
    """
    growing = partial_path(job.output)
    shutil.rmtree(growing, ignore_errors=True)
    (growing / "pocketlm").mkdir(parents=True)
    ledger.files.update(assemble(growing, entries, on_progress=on_progress))
    for name, data in sorted(side_files.items()):
        (growing / name).parent.mkdir(parents=True, exist_ok=True)
        digest = write_file(growing / name, data)
        if name != CARD:  # the report's card takes its place
            ledger.files[name] = digest
    for name, data in job.stage_ledgers.items():
        (growing / name).parent.mkdir(parents=True, exist_ok=True)
        ledger.files[name] = write_file(growing / name, data)
    asked = job.recipe  # as it was resolved, behind the stages that came before it
    if job.whole is not None:
        before = job.whole.steps[: len(job.stages)]
        asked = asked.model_copy(update={"steps": (*before, *asked.steps)})
    recipe = yaml.safe_dump(asked.model_dump(mode="json"), sort_keys=False).encode()
    ledger.files["pocketlm/recipe.yaml"] = write_file(growing / "pocketlm" / "recipe.yaml", recipe)
    if windows is not None:
        ledger.files[HASHES] = write_file(growing / HASHES, hashes_file(windows))
    config = dict(config)
    if job.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(job.dtype).removeprefix("torch.")
    data = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    ledger.files["config.json"] = hashlib.sha256(data).hexdigest()
    text = ledger.model_dump_json(indent=1).encode() + b"\n"
    write_file(growing / "pocketlm" / "ledger.json", text)
    shutil.copyfile(events, growing / "pocketlm" / "events.jsonl")
    write_file(growing / "config.json", data)
    _take_place(growing, job.output)


def _take_place(growing: Path, output: Path) -> None:
    """Renames; an artifact that is being replaced stands aside until the new one is in place."""
    aside = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if output.exists():
        output.replace(aside)
    growing.replace(output)
    sync_directory(output.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _config(model: ModelView, grids: Grids, ledger: Ledger) -> dict[str, Any]:
    config = copy.deepcopy(dict(model.config))
    specs: dict[str, Any] = {}  # as they came out; what stays an ordinary tensor is not named
    floats: list[str] = []
    for name, entry in ledger.compressed().items():
        module = name.removesuffix(".weight")
        if isinstance(entry.spec, DenseSpec):
            floats.append(module)
        else:
            specs[module] = entry.spec
    kept = [*grids.kept, *floats, *_left_alone(model, ledger)]
    kept += [model.other_names[name] for name in kept if name in model.other_names]
    section = format_for(grids.format_name)
    if grids.format_name == "pocketlm":
        ends = set(grids.ends)
        transposed = [name for name in specs if name not in ends] if model.stores_transposed else []
        config["quantization_config"] = section.config_section(
            specs, kept, transposed, grids.inputs, model.shortcuts
        )
        config |= pocketlm.GUARD
    elif specs:
        config["quantization_config"] = section.config_section(specs, kept, grids.inputs)
    if grids.untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    return config


def _shard_entries(
    model: ModelView, job: Job, grids: Grids, journal: Journal, ledger: Ledger
) -> Iterator[ShardEntry]:
    """Every tensor of the artifact in the source's order; fills the ledger on the way."""
    stored: dict[str, tuple[Path, StoredTensor]] = {}
    for index in range(len(model.block_paths)):
        path, accounts = journal.block_files(index)
        ledger.tensors.update(accounts)
        stored.update({name: (path, place) for name, place in read_header(path).items()})
    stored_blocks = set(ledger.tensors)
    ends: dict[str, list[ShardEntry]] = {}  # what stands for a tensor of the source, in place
    for task in end_tasks(model.ends(), grids.ends, len(model.block_paths)):
        accounts, pieces = stored_end(task, journal)
        ledger.tensors.update(accounts)
        ends.setdefault(task.end.tensor, []).extend(
            _end_entry(task, name, parts) for name, parts in pieces.items()
        )
    for name, info in model.source.infos().items():
        yield from ends.get(name, ())
        if name in ledger.tensors and name not in stored_blocks:
            continue  # an embedding or head
        if name in ledger.tensors:
            for output in ledger.tensors[name].outputs:
                path, place = stored[output]
                yield ShardEntry(output, place.dtype, place.shape, _file_chunks(path, place))
            continue
        if name in model.repeated:
            ledger.tensors[name] = Entry(
                action="dropped", reason="repeats a tied tensor", shape=info.shape, bits=0
            )
            continue
        kept = kept_info(info, job.dtype)
        ledger.tensors[name] = Entry(
            action="kept",
            reason=_reason(name, grids, model.shortcuts),
            shape=info.shape,
            bits=kept.bytes_stored * 8,
            notes=[f"cast from {info.dtype} to {kept.dtype}"] if kept != info else [],
            outputs=[name],
        )
        yield ShardEntry(
            name, kept.dtype, kept.shape, source_chunks(model.source, info, kept.dtype)
        )


def _left_alone(model: ModelView, ledger: Ledger) -> list[str]:
    """Modules of blocks whose matrix is kept: what an engine takes for a linear must be named.

    Routers and the gate of a shared expert are classes of their own in one engine or release and
    plain linears in another, which would look for their codes.
    """
    return [
        name.removesuffix(".weight")
        for name, entry in ledger.tensors.items()
        if entry.action == "kept"
        and len(entry.shape) == 2
        and name.endswith(".weight")
        and name.startswith(tuple(f"{path}." for path in model.block_paths))
    ]


def _end_entry(task: EndTask, name: str, pieces: Pieces) -> ShardEntry:
    """A tensor of a compressed embedding or head, its rows out of all chunks."""
    first = pieces[0][1]
    if name.endswith(f".{SHAPE}"):
        whole = torch.tensor(task.end.shape, dtype=first.dtype).numpy().tobytes()
        return ShardEntry(name, first.dtype, first.shape, lambda: iter([whole]))
    shape = (task.end.shape[0], *first.shape[1:])

    def chunks() -> Iterator[bytes | memoryview]:
        for path, place in pieces:
            yield from _file_chunks(path, place)()

    return ShardEntry(name, first.dtype, shape, chunks)


def _reason(name: str, grids: Grids, shortcuts: Mapping[str, str]) -> str:
    module = name.removesuffix(".weight")
    if module in shortcuts:
        return REASON
    return grids.kept.get(module, "not a linear of a decoder block")


def kept_info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor that is kept, in the dtype it is stored in."""
    if dtype is None or not info.dtype.is_floating_point:
        return info
    return TensorInfo(info.name, dtype, info.shape)


def _file_chunks(path: Path, place: StoredTensor) -> Callable[[], Iterator[bytes | memoryview]]:
    def chunks() -> Iterator[bytes | memoryview]:
        with path.open("rb") as file:
            file.seek(place.start)
            left = place.bytes_stored
            while left:
                data = file.read(min(CHUNK_BYTES, left))
                left -= len(data)
                yield data

    return chunks


def source_chunks(
    source: TensorSource, info: TensorInfo, dtype: torch.dtype
) -> Callable[[], Iterator[bytes | memoryview]]:
    """What gives a tensor's bytes piece by piece, cast where `dtype` is another than its own."""

    def chunks() -> Iterator[bytes | memoryview]:
        for data in source.chunks(info.name, CHUNK_BYTES):
            if dtype == info.dtype:
                yield data
            else:
                values = torch.frombuffer(bytearray(data), dtype=info.dtype).to(dtype)
                yield values.view(torch.uint8).numpy().data

    return chunks
