"""What an artifact keeps of its calibration: where the windows came from, and hashes of their runs.

The account is part of the ledger, the hashes are a small file beside it, so that an evaluation
anywhere can tell whether it reads what was calibrated on.
"""

from __future__ import annotations

import io

import numpy as np
from pydantic import BaseModel, ConfigDict

from pocketlm.calibration.health import TextHealth
from pocketlm.calibration.runs import run_hashes
from pocketlm.calibration.windows import Windows


class CalibrationAccount(BaseModel):
    """What was calibrated on.

    Attributes:
        text_name: As a report names it.
        text_sha256: Of the whole text.
        windows_sha256: Of the token ids.
        samples: Windows.
        seq_len: Tokens of each.
        bos: Whether each starts with the tokenizer's BOS.
        seed: Of the sampling.
        health: What the windows are made of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_name: str
    text_sha256: str
    windows_sha256: str
    samples: int
    seq_len: int
    bos: bool
    seed: int | None
    health: TextHealth | None = None

    def sentence(self) -> str:
        """The account in words, for reports."""
        return (
            f"{self.samples} windows of {self.seq_len} tokens of {self.text_name} "
            f"(sha256 {self.text_sha256[:12]}), seed {self.seed}"
        )


def account_of(windows: Windows) -> CalibrationAccount:
    """The account of some windows."""
    samples, seq_len = windows.tokens_NT.shape
    return CalibrationAccount(
        text_name=windows.text_name,
        text_sha256=windows.text_sha256,
        windows_sha256=windows.sha256,
        samples=samples,
        seq_len=seq_len,
        bos=windows.bos,
        seed=windows.seed,
        health=windows.health,
    )


def hashes_file(windows: Windows) -> bytes:
    """The hashes of the windows' runs, as a file in numpy's format."""
    file = io.BytesIO()
    np.save(file, np.unique(run_hashes(windows.tokens_NT)), allow_pickle=False)
    return file.getvalue()


def read_hashes(data: bytes) -> np.ndarray:
    """What `hashes_file` wrote."""
    return np.load(io.BytesIO(data), allow_pickle=False)
