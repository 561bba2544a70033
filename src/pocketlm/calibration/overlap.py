"""Does the evaluation text stand in the calibration text? Shared runs of words tell.

Anchors are words whose checksum falls in one class of sixteen: the choice depends on the words
alone, so that both texts pick the same places. The words that follow an anchor are its shingle.
"""

from __future__ import annotations

import zlib

from pocketlm.calibration.texts import TextSet

ANCHOR_CLASS = 16
SHINGLE_WORDS = 13  # long enough that chance and stock phrases do not count
TOLERATED = 0.01  # of the evaluation text's shingles


def overlap_warning(calibration: TextSet, evaluation: TextSet) -> str | None:
    """Warns if the two texts share more than a hundredth of their places.

    Args:
        calibration: What the model was compressed with.
        evaluation: What it is measured on.

    Returns:
        A sentence for the user, or None.
    """
    if calibration.sha256 == evaluation.sha256:
        return f"the evaluation text {evaluation.name} is the calibration text."
    known, asked = _shingles(calibration), _shingles(evaluation)
    if not asked:
        return None
    shared = len(asked & known) / len(asked)
    if shared <= TOLERATED:
        return None
    return (
        f"{shared:.0%} of the evaluation text {evaluation.name} also stands in the calibration "
        f"text {calibration.name}: the figures flatter the result."
    )


def _shingles(text: TextSet) -> set[int]:
    words = text.joined.split()
    found = set()
    for start in range(len(words) - SHINGLE_WORDS + 1):
        if zlib.crc32(words[start].encode("utf-8", "surrogatepass")) % ANCHOR_CLASS == 0:
            found.add(hash(" ".join(words[start : start + SHINGLE_WORDS])))
    return found
