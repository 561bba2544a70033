"""Runs one transform: statistics, decision, and the smaller model written tensor by tensor.

    survey the original → decide → prove that it opens → stream every tensor through its edit

What comes out is an ordinary checkpoint with a ledger. A run that was stopped goes on after the
last block that was looked at; writing begins anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save

from pocketlm.calibration.record import account_of
from pocketlm.calibration.windows import Windows
from pocketlm.core.changes import Changes
from pocketlm.core.transform import Findings, Outline, Transform
from pocketlm.engine.artifact import kept_info, source_chunks, write_files
from pocketlm.engine.attempt import attempt, in_place
from pocketlm.engine.compress import fingerprint, finished_ledger
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.grids import Grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Entry, Ledger, StageAccount
from pocketlm.engine.options import Job
from pocketlm.engine.progress import Progress
from pocketlm.engine.streamed_survey import StreamedSurvey
from pocketlm.engine.transform_plan import format_of, weights_of
from pocketlm.formats import dense, pocketlm
from pocketlm.formats.shards import Entry as ShardEntry
from pocketlm.formats.shards import write_file
from pocketlm.models import Model
from pocketlm.models.opening import changed_config, reopen

FOUND = "found"  # what the survey found, in the work directory


def run_transform(
    model: Model,
    outline: Outline,
    transform: Transform,
    job: Job,
    windows: Windows | None,
    *,
    restart: bool,
    listener: Listener | None,
    planned: float = 1.0,
) -> Ledger:
    """Makes the smaller model, or goes on where an earlier attempt stopped.

    Args:
        model: The original.
        outline: Its dimensions.
        transform: What is done.
        job: Where to, and how the work is divided; its recipe is what the artifact carries.
        windows: Calibration tokens; None where the transform needs none.
        restart: Forget an earlier attempt.
        listener: Called with each event.
        planned: Predicted seconds.

    Returns:
        The ledger of the artifact, new or in place already.

    Raises:
        ConfigError: If the decision would remove everything.
        OutputBusy: If something else lies at the output.
        ResumeError: If an unfinished run there had another fingerprint.
        ResourceError: If memory or disk ran out; the same command goes on from there.
    """
    none = Grids({}, {}, {}, dense.NAME)
    job = replace(
        job,
        fingerprint={**fingerprint(model, job, none, windows), **job.fingerprint},
        warnings=(*job.warnings, *(() if windows is None else windows.notes)),
    )
    ledger = finished_ledger(job.output)
    journal = Journal(job.work_dir, job.fingerprint, restart=restart)
    with attempt(job, journal, model.device):
        if in_place(ledger, job, journal, restart=restart):
            assert ledger is not None
            return ledger
        log = EventLog(journal.events_path, listener)
        log.emit("run_started", f"making a smaller model of {job.source}")
        ledger = _run(model, outline, transform, job, windows, journal, log, planned)
    journal.clear()
    return ledger


def _run(
    model: Model,
    outline: Outline,
    transform: Transform,
    job: Job,
    windows: Windows | None,
    journal: Journal,
    log: EventLog,
    planned: float,
) -> Ledger:
    progress = Progress(log, {"calibrate": planned, "assemble": 0.0})
    progress.stage("calibrate", "looking at the original")
    survey = StreamedSurvey(
        model, outline, windows, journal, job.tokens_at_once, job.activation_bytes, progress.step
    )
    started = time.monotonic()
    found = _kept(journal.directory / FOUND, lambda: transform.measure(survey))
    changes = transform.changes(outline, found)
    log.emit("block_done", changes.sentence, seconds=time.monotonic() - started)
    for note in changes.notes:
        log.emit("warning", note)
    progress.stage("assemble", "writing the smaller model")
    smaller = reopen(model, changes)
    format_name = format_of(changes, job.target)
    ledger = Ledger(
        source=job.source,
        format=format_name,
        fingerprint=job.fingerprint,
        calibration=None if windows is None else account_of(windows),
        warnings=[*job.warnings, *changes.notes],
        stages=[*job.stages, account(job, model, smaller, changes)],
    )
    _fill(ledger, model, smaller, changes, job.dtype)
    ledger.require_complete(list(model.source.infos()))
    config = changed_config(model, changes.config)
    if changes.shortcuts:
        config["quantization_config"] = pocketlm.config_section({}, (), shortcuts=changes.shortcuts)
        config |= pocketlm.GUARD
    write_files(
        job,
        dict(model.side_files()),
        windows,
        ledger,
        _shards(smaller, job.dtype),
        config,
        journal.events_path,
        lambda done, total: progress.step(done / max(total, 1), "writing the smaller model"),
    )
    log.emit("run_done", f"wrote {job.output}")
    return ledger


def account(job: Job, model: Model, smaller: Model, changes: Changes) -> StageAccount:
    """What the ledger keeps of a stage."""
    step = job.recipe.steps[-1]
    return StageAccount(
        method=step.method,
        options=dict(step.options),
        summary=changes.sentence,
        config={key: value for key, value in changes.config.items()},
        parameters_before=weights_of(model),
        parameters_after=weights_of(smaller),
        notes=list(changes.notes),
    )


def _kept(path: Path, measure: Callable[[], Findings]) -> Findings:
    """What was found, from the work directory where an earlier attempt has left it whole."""
    counts, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if not counts.exists():
        found = measure()
        flat = {
            f"{i}.{n}": v.cpu().clone(memory_format=torch.contiguous_format)
            for i, one in enumerate(found)
            for n, v in one.items()
        }
        write_file(tensors, save(flat))
        write_file(counts, json.dumps(len(found)).encode())
    read: Findings = [{} for _ in range(json.loads(counts.read_text("utf-8")))]
    for name, value in load(tensors.read_bytes()).items():
        index, _, inner = name.partition(".")
        read[int(index)][inner] = value
    return read


def _fill(
    ledger: Ledger, model: Model, smaller: Model, changes: Changes, dtype: torch.dtype | None
) -> None:
    """An entry for every tensor of the source."""
    infos, written = model.source.infos(), smaller.source.infos()
    outputs: dict[str, list[str]] = {}
    action: dict[str, str] = {}
    for edit in changes.edits:
        first = edit.parts[0][0]
        outputs.setdefault(first, []).append(edit.name)
        if not edit.copies and edit.account:
            action.setdefault(first, edit.account)
    for name, info in infos.items():
        made = outputs.get(name, [])
        bits = sum(8 * kept_info(written[output], dtype).bytes_stored for output in made)
        what = action.get(name, "kept" if made else "dropped")
        reason = changes.dropped.get(name, changes.sentence)
        if what == "kept":
            reason = "unchanged" if made == [name] else f"unchanged, named {made[0]} now"
        ledger.tensors[name] = Entry.model_validate(
            {"action": what, "reason": reason, "shape": info.shape, "bits": bits, "outputs": made}
        )


def _shards(smaller: Model, dtype: torch.dtype | None) -> list[ShardEntry]:
    entries = []
    for name, info in smaller.source.infos().items():
        kept = kept_info(info, dtype)
        data = source_chunks(smaller.source, info, kept.dtype)
        entries.append(ShardEntry(name, kept.dtype, kept.shape, data))
    return entries
