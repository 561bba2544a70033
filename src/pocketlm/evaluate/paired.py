"""Two models on the same items: the difference, its interval, and what it decides.

b items only the original answers, c only the model, n in all; change d = (c - b) / n.
Interval of a change of right and wrong: Wald's after adding 1/2 to each of the four cells of the
paired table (Agresti & Min, Statistics in Medicine 2005), which holds its level where few or no
items differ. Of other scores: percentile bootstrap over items.
Test: McNemar's, exact: min(b, c) of b + c fair coins, two-sided.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from pocketlm.evaluate.bootstrap import Floats, Interval, item_interval

Z = 1.959963984540054  # of a two-sided 95 % interval

Verdict = Literal["pass", "regression", "inconclusive"]


def share_interval(scores_N: Floats) -> Interval:
    """The mean of scores and its 95 % interval: Wilson's where each is right or wrong.

    Args:
        scores_N: One score an item, float64 [N].
    """
    if not _binary(scores_N):
        return item_interval(scores_N)
    count = len(scores_N)
    bounds = binomtest(int(scores_N.sum()), count).proportion_ci(0.95, method="wilson")
    return Interval(value=float(scores_N.mean()), low=float(bounds.low), high=float(bounds.high))


def change_interval(scores_N: Floats, original_N: Floats) -> Interval:
    """The mean of paired differences and its 95 % interval.

    Args:
        scores_N: The model's, float64 [N].
        original_N: The original's, of the same items.
    """
    change_N = scores_N - original_N
    if not (_binary(scores_N) and _binary(original_N)):
        return item_interval(change_N)
    count = len(change_N) + 2
    won, lost = float((change_N > 0).sum()) + 0.5, float((change_N < 0).sum()) + 0.5
    middle = (won - lost) / count
    half = Z * math.sqrt(won + lost - (won - lost) ** 2 / count) / count
    return Interval(value=float(change_N.mean()), low=middle - half, high=middle + half)


def mcnemar(scores_N: Floats, original_N: Floats) -> float | None:
    """The exact two-sided p-value of no difference; None where scores are not right or wrong."""
    if not (_binary(scores_N) and _binary(original_N)):
        return None
    won, lost = int((scores_N > original_N).sum()), int((scores_N < original_N).sum())
    return 1.0 if won + lost == 0 else float(binomtest(won, won + lost).pvalue)


def judge(change: Interval, margin: float) -> Verdict:
    """What the interval of a change decides.

    Args:
        change: The model's score minus the original's.
        margin: The loss that is tolerated, at least 0.

    Returns:
        ``pass`` where the whole interval lies above minus the margin; ``regression`` where it does
        not and all of it is below 0; else ``inconclusive``.
    """
    if change.low > -margin:
        return "pass"
    return "regression" if change.high < 0 else "inconclusive"


def more_items(change: Interval, count: int, margin: float) -> int | None:
    """About how many further items would decide, if the change stayed as it is.

    The interval's half width falls with the root of the number of items.

    Args:
        change: Inconclusive.
        count: Items that it was measured on.
        margin: The loss that is tolerated.

    Returns:
        None where no number would: the change lies exactly on minus the margin, and is not below 0.
    """
    half = (change.high - change.low) / 2
    reach = [gap for gap in (change.value + margin, -change.value) if gap > 0]
    if not reach:
        return None
    needed = math.ceil(count * (half / max(reach)) ** 2)
    return max(1, needed - count)


def _binary(scores_N: Floats) -> bool:
    return bool(np.isin(scores_N, (0.0, 1.0)).all())
