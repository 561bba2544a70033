"""Does an evaluation read what the calibration has read? Runs of tokens that both hold tell.

Of all runs of `RUN` tokens those whose hash is 0 modulo `CLASS` are kept: both sides keep the same
ones, and the share of the evaluation's that the calibration also has estimates the containment of
one in the other (Broder 1997, On the resemblance and containment of documents). They are hashes of
what was read, not of the whole text: the file beside an artifact stays small, and tells wherever
the artifact goes.

Legend: N windows, T tokens of a window.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pocketlm.calibration.windows import Windows

RUN = 32  # tokens: long enough that stock phrases of technical prose do not count
CLASS = 32
TOLERATED = 0.01  # of the evaluation's runs


def run_hashes(tokens_NT: Tensor) -> np.ndarray:
    """The kept hashes of a set of windows.

    Args:
        tokens_NT: int64 ids.

    Returns:
        uint32, sorted, each once; about one for every `CLASS` tokens.
    """
    ids_NT = tokens_NT.numpy().astype(np.uint64)
    count = max(0, ids_NT.shape[1] - RUN + 1)
    hashes = np.zeros((ids_NT.shape[0], count), np.uint64)
    for place in range(RUN):  # a polynomial in the ids, modulo 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids_NT[:, place : place + count] + 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's end
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    kept = hashes[hashes % CLASS == 0] >> np.uint64(32)
    return np.unique(kept.astype(np.uint32))


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
    asked = run_hashes(evaluation.tokens_NT)
    shared = np.isin(asked, known).mean() if asked.size else 0.0
    if shared <= TOLERATED:
        return None
    return (
        f"{shared:.0%} of what was evaluated of {evaluation.text_name} was also calibrated on "
        f"({text_name}): the figures flatter the result."
    )
