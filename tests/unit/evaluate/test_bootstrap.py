"""Intervals against known distributions and against a plain resampling loop."""

import numpy as np
import pytest

from pocketlm.evaluate.bootstrap import mean_interval, quantile_intervals


def test_mean_interval_has_the_width_that_theory_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = mean_interval(values)
    assert interval.value == values.mean()
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_one_window_has_no_width() -> None:
    interval = mean_interval(np.array([2.5]))
    assert interval.low == interval.value == interval.high == 2.5


def test_seeds_decide() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_a_quantile_is_the_least_value_that_its_share_does_not_exceed() -> None:
    one_window = np.arange(10.0, 0.0, -1.0)[None]
    found = quantile_intervals(one_window, [0.05, 0.1, 0.11, 0.5, 0.91, 0.95])
    assert [interval.value for interval in found] == [1, 1, 2, 5, 10, 10]
    assert all(interval.low == interval.value == interval.high for interval in found)


def test_quantiles_are_over_tokens_and_their_intervals_over_windows() -> None:
    generator = np.random.default_rng(0)
    windows = generator.exponential(size=(30, 1)) * generator.exponential(size=(30, 50))
    median, p99 = quantile_intervals(windows, [0.5, 0.99])
    assert median.value == np.sort(windows, axis=None)[749]
    assert p99.value == np.sort(windows, axis=None)[1484]
    drawn = [np.quantile(windows[generator.integers(0, 30, 30)], [0.5, 0.99]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert (median.low, median.high) == pytest.approx((low[0], high[0]), rel=0.15)
    assert (p99.low, p99.high) == pytest.approx((low[1], high[1]), rel=0.15)
