"""The whole of one compression: grids, plan, fingerprint, lock, run, clean-up."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pocketlm import __version__
from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import CalibrationError, OutputBusy
from pocketlm.core.views import ModelView
from pocketlm.engine.attempt import attempt, in_place
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.grids import Grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Ledger
from pocketlm.engine.options import Job
from pocketlm.engine.plan import Plan
from pocketlm.engine.runner import Outcome, Runner

VERSIONED = ("torch", "transformers", "safetensors")


def fingerprint(
    model: ModelView, job: Job, grids: Grids, windows: Windows | None
) -> dict[str, Any]:
    """Everything that the artifact's bytes depend on, as plain JSON."""
    ends = {name: spec.model_dump(mode="json") for name, spec in grids.ends.items()}
    return {
        "source": model.source.fingerprint(),
        "recipe": job.recipe.model_dump(mode="json"),
        "grids": {
            name: spec and spec.model_dump(mode="json") for name, spec in grids.specs.items()
        },
        "inputs": {name: spec.model_dump(mode="json") for name, spec in grids.inputs.items()},
        **({"ends": ends} if ends else {}),
        "format": grids.format_name,
        "calibration": None if windows is None else windows.sha256,
        "samples": None if windows is None else windows.tokens_NT.shape[0],
        "tokens_at_once": job.tokens_at_once,
        "seed": job.seed,
        "dtype": None if job.dtype is None else str(job.dtype),
        "compute_dtype": str(model.compute_dtype),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"pocketlm": __version__, **{name: version(name) for name in VERSIONED}},
    }


def earlier_samples(output: Path, work_dir: Path) -> int | None:
    """Calibration windows that an earlier attempt at this output settled on, if there was one."""
    path = work_dir / "run.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["samples"]
    ledger = finished_ledger(output)
    return None if ledger is None else ledger.fingerprint["samples"]


def finished_ledger(output: Path) -> Ledger | None:
    """The ledger of a whole artifact at `output`, or None where there is none.

    Raises:
        OutputBusy: If the directory holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    path = output / "pocketlm" / "ledger.json"
    if not (output / "config.json").is_file() or not path.is_file():
        raise OutputBusy(
            "exists and is no artifact of pocketlm.",
            where=str(output),
            remedy="Give another -o; pocketlm deletes nothing that it did not write.",
        )
    return Ledger.model_validate_json(path.read_text(encoding="utf-8"))


def run_job(
    model: ModelView,
    job: Job,
    grids: Grids,
    windows: Windows | None,
    plan: Plan,
    *,
    restart: bool,
    listener: Listener | None,
) -> Outcome | None:
    """Compresses, or goes on where an earlier attempt stopped.

    Args:
        model: The source.
        job: What to do.
        grids: The fitted grids.
        windows: Calibration tokens; None where no step needs any.
        plan: What was predicted: for the time left, and the event log.
        restart: Forget an earlier attempt, finished or not.
        listener: Called with each event.

    Returns:
        What was done; None where the very same artifact is in place already.

    Raises:
        CalibrationError: If something needs calibration tokens and there are none.
        OutputBusy: If another run holds the output, or something else lies there.
        ResumeError: If an unfinished run there had another fingerprint.
        ResourceError: If memory or disk ran out; the same command goes on from there.
    """
    if job.needs_data and windows is None:
        raise CalibrationError(
            "the recipe needs calibration tokens, and none are given.",
            where="windows",
            remedy="Give some, or a method without data: hqq or rtn.",
        )
    of_the_text = () if windows is None else windows.notes
    said = [*((note, None) for note in job.warnings), *((n, "calibration") for n in of_the_text)]
    job = replace(
        job,
        fingerprint={**fingerprint(model, job, grids, windows), **job.fingerprint},
        warnings=(*job.warnings, *of_the_text),
    )
    ledger = finished_ledger(job.output)
    journal = Journal(job.work_dir, job.fingerprint, restart=restart)
    with attempt(job, journal, model.device):
        if in_place(ledger, job, journal, restart=restart):
            return None
        log = EventLog(journal.events_path, listener)
        log.emit("run_started", f"compressing {job.source} to {job.output}",
                 data={"plan": plan.model_dump(mode="json")})  # fmt: skip
        for name, note in grids.notes.items():
            log.emit("warning", note, where=name, data={"kind": "grid"})
        for note, where in said:
            log.emit("warning", note, where=where)
        started = time.monotonic()
        outcome = Runner(model, job, grids, windows, journal, log, plan).run()
        log.emit("run_done", f"wrote {job.output}", seconds=time.monotonic() - started)
    journal.clear()
    return outcome
