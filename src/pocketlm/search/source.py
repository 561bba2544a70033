"""From what a user names to a search: opens the model, draws the text, asks the question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.machine import cache_directory
from pocketlm.models import open_model
from pocketlm.runtime.calibration_windows import calibration_windows
from pocketlm.search.results import SearchResult
from pocketlm.search.run import Question, run_search

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS, SEQ_LEN = 4, 512  # of text: one batch, through which every change runs


def search_source(
    source: str | Path | PreTrainedModel,
    question: Question,
    *,
    calibration: str,
    seed: int,
    device: str,
    directory: Path | None,
    trust_remote_code: bool,
    revision: str | None,
    listener: Listener | None,
) -> SearchResult:
    """Runs a search on a model.

    Blocks compute in float32 whatever the model's dtype: rounding to 16 bits would drown the
    damage of a single layer at 4 bits and more.

    Args:
        source: What `open_model` takes.
        question: What is searched for.
        calibration: What `load_text` takes, or ``self``.
        seed: Of the windows.
        device: Where blocks compute.
        directory: Where findings are kept; None: the user's cache.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        listener: Called with each event.

    Returns:
        What was found.
    """
    model = open_model(
        source,
        device=device,
        compute_dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    windows = calibration_windows(
        model, source, calibration, WINDOWS, min(SEQ_LEN, model.context), seed,
        EventLog(None, listener), trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    return run_search(model, windows, question, directory or cache_directory("search"), listener)
