"""Hashes of runs of tokens: what two texts, or one with itself, have in common.

Of all runs of `RUN` tokens those whose hash is 0 modulo `CLASS` are kept: the same ones wherever a
run stands, and a fair sample of all (Broder 1997, On the resemblance and containment of documents).

Legend: N windows, T tokens of a window.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

RUN = 32  # tokens: long enough that stock phrases of technical prose do not count
CLASS = 32


def run_hashes(tokens_NT: Tensor) -> np.ndarray:
    """The kept hashes of windows, as often as they occur.

    Args:
        tokens_NT: int64 ids.

    Returns:
        uint32; about one for every `CLASS` tokens.
    """
    ids_NT = tokens_NT.numpy().astype(np.uint64)
    count = max(0, ids_NT.shape[1] - RUN + 1)
    hashes = np.zeros((ids_NT.shape[0], count), np.uint64)
    for place in range(RUN):  # a polynomial in the ids, modulo 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids_NT[:, place : place + count] + 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's end
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    return (hashes[hashes % CLASS == 0] >> np.uint64(32)).astype(np.uint32)
