"""Does an evaluation read what the calibration has read? Runs of tokens that both hold tell.

The share of the evaluation's runs that the calibration also has estimates the containment of one in
the other. What was calibrated on is known by hashes of what was read, not by the whole text: the
file beside an artifact stays small, and tells wherever the artifact goes.
"""

from __future__ import annotations

import numpy as np

from pocketlm.calibration.runs import run_hashes
from pocketlm.calibration.windows import Windows

TOLERATED = 0.01  # of the evaluation's runs


def overlap_warning(
    text_name: str, text_sha256: str, known: np.ndarray, evaluation: Windows
) -> str | None:
    """Warns if more than a hundredth of what an evaluation reads was calibrated on.

    Args:
        text_name: Of the calibration text, for the message.
        text_sha256: Of the calibration text.
        known: What `run_hashes` gave for the calibration windows.
        evaluation: The windows that are evaluated.

    Returns:
        A sentence for the user, or None.
    """
    if text_sha256 == evaluation.text_sha256:
        return f"the evaluation text {evaluation.text_name} is the calibration text."
    asked = np.unique(run_hashes(evaluation.tokens_NT))
    shared = np.isin(asked, known).mean() if asked.size else 0.0
    if shared <= TOLERATED:
        return None
    return (
        f"{shared:.0%} of what was evaluated of {evaluation.text_name} was also calibrated on "
        f"({text_name}): the figures flatter the result."
    )
