"""Percentile bootstrap over windows: tokens of one window depend on each other, windows hardly do.

Each resample draws N windows with replacement. A quantile is taken over all tokens of the drawn
windows; a mean over the windows' means (windows are equally long).

Legend: N windows, T tokens of a window, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

RESAMPLES_MEAN = 10_000
RESAMPLES_QUANTILE = 500  # each sorts through all tokens
CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)

Floats = NDArray[np.float64]


class Interval(BaseModel):
    """A figure with its 95 % bootstrap interval over windows.

    Attributes:
        value: On the windows measured.
        low: Lower end; equals `value` where there is one window only.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def mean_interval(values_N: Floats, seed: int = 0) -> Interval:
    """The mean over windows and its interval.

    Args:
        values_N: One figure a window, float64 [N].
        seed: Of the resampling.

    Returns:
        In the unit of the values.
    """
    weights_RN = _weights(len(values_N), RESAMPLES_MEAN, seed)
    low, high = np.quantile(weights_RN @ values_N / len(values_N), _TAILS)
    return Interval(value=float(values_N.mean()), low=float(low), high=float(high))


def item_interval(values_N: Floats, seed: int = 0) -> Interval:
    """The mean over items and its interval; equal values are drawn together.

    Args:
        values_N: One figure an item, float64 [N]; many items have few different ones.
        seed: Of the resampling.
    """
    distinct, counts = np.unique(values_N, return_counts=True)
    shares = counts / len(values_N)
    generator, means = np.random.default_rng(seed), np.empty(RESAMPLES_MEAN)
    for start in range(0, RESAMPLES_MEAN, 1000):  # bounds the memory where all values differ
        drawn = generator.multinomial(len(values_N), shares, size=1000)
        means[start : start + 1000] = drawn @ distinct / len(values_N)
    low, high = np.quantile(means, _TAILS)
    return Interval(value=float(values_N.mean()), low=float(low), high=float(high))


def quantile_intervals(values_NT: Floats, quantiles: list[float], seed: int = 0) -> list[Interval]:
    """Quantiles over all tokens and their intervals over windows.

    Args:
        values_NT: One figure a token, float64 [N, T].
        quantiles: Each in (0, 1).
        seed: Of the resampling.

    Returns:
        One interval a quantile: the smallest value that this share of tokens does not exceed.
    """
    windows, length = values_NT.shape
    order = np.argsort(values_NT, axis=None, kind="stable")
    sorted_values, window_of = values_NT.reshape(-1)[order], order // length
    asked = np.array(quantiles)

    def take(weights_N: NDArray[np.int64]) -> Floats:
        reached = np.cumsum(weights_N[window_of])
        return sorted_values[np.searchsorted(reached, np.ceil(asked * reached[-1]))]

    value = take(np.ones(windows, dtype=np.int64))
    drawn_RQ = np.stack([take(w) for w in _weights(windows, RESAMPLES_QUANTILE, seed)])
    low, high = np.quantile(drawn_RQ, _TAILS, axis=0)
    return [
        Interval(value=float(value[q]), low=float(low[q]), high=float(high[q]))
        for q in range(len(quantiles))
    ]


def _weights(windows: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each window is drawn, [R, N]."""
    even = np.full(windows, 1 / windows)
    return np.random.default_rng(seed).multinomial(windows, even, size=resamples)
