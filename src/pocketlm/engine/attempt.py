"""One attempt at an output: what lies there already, and what a failed attempt leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager

import torch

from pocketlm.core.errors import OutputBusy, ResourceError
from pocketlm.engine.artifact import partial_path
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Ledger
from pocketlm.engine.options import Job


def in_place(ledger: Ledger | None, job: Job, journal: Journal, *, restart: bool) -> bool:
    """Whether the very same artifact is there already; then the journal is cleared.

    Args:
        ledger: Of a whole artifact at the output; None where there is none.
        job: What is to be done, with its fingerprint.
        journal: Of the attempt.
        restart: Whether an earlier result is to be forgotten.

    Raises:
        OutputBusy: If another artifact is there.
    """
    if ledger is None or restart:
        return False
    if ledger.fingerprint == job.fingerprint:
        journal.clear()
        return True
    if journal.resumed:  # an interrupted --restart goes on
        return False
    journal.clear()
    raise OutputBusy(
        "holds an artifact made in another way.",
        where=str(job.output),
        remedy="Give another -o, or add --restart to replace it.",
    )


@contextmanager
def attempt(job: Job, journal: Journal, device: torch.device) -> Generator[None]:
    """Leaves a failed attempt so that the same command goes on: the lock released, blocks kept.

    Raises:
        ResourceError: If memory ran out.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        journal.release()
        raise ResourceError(
            "memory ran out.",
            where=str(device),
            remedy="Lower --activation-budget, --samples or --seq-len; the same command goes on.",
        ) from error
    except BaseException:
        shutil.rmtree(partial_path(job.output), ignore_errors=True)
        journal.release()
        raise
