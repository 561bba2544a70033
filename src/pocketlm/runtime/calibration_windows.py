"""Calibration windows by what the user named: drawn from a text, or written by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows, token_windows
from pocketlm.engine.events import EventLog
from pocketlm.models.adapter import Model
from pocketlm.runtime.own_text import own_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_TEXT = "self"


def calibration_windows(
    view: Model,
    source: str | Path | PreTrainedModel,
    calibration: str,
    samples: int,
    seq_len: int,
    seed: int,
    log: EventLog,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Windows:
    """Windows of `seq_len` tokens to calibrate or measure on.

    Args:
        view: The model as it is streamed.
        source: The model itself, or what `load` takes: ``self`` needs it whole.
        calibration: What `load_text` takes, or ``self``.
        samples: Windows wanted.
        seq_len: Tokens of each.
        seed: Same seed, same windows.
        log: Told how far the model's writing has come.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Raises:
        PocketLMError: If the text cannot be read or is too short, or the model cannot write.
    """
    if calibration == OWN_TEXT:
        return own_windows(
            view, source, samples, seq_len, seed, log,
            trust_remote_code=trust_remote_code, revision=revision,
        )  # fmt: skip
    tokenizer = view.tokenizer()
    text = load_text(calibration, "calibration", tokenizer)
    return token_windows(tokenizer, text, samples, seq_len, seed, view.context)
