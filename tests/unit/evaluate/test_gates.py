"""Gates: the far end of an interval decides, and what cannot be judged is refused before work."""

from __future__ import annotations

import math

import pytest

from pocketlm.core.errors import ConfigError, GateFailed, GateUndecided
from pocketlm.evaluate.bootstrap import Interval
from pocketlm.evaluate.gates import judge_gates, parse_gates, raise_for_gates
from pocketlm.evaluate.quality import evaluate_model

INSIDE = Interval(value=0.04, low=0.03, high=0.06)


def gate(text: str):
    return parse_gates([text], ["arc_easy"], has_original=True)[0]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("kl<0.07", "pass"),
        ("kl<0.05", "inconclusive"),
        ("kl<0.02", "fail"),
        ("kl < 0.06", "inconclusive"),
        ("kl<=0.06", "pass"),
        ("top1>0.02", "pass"),
        ("top1>0.05", "inconclusive"),
        ("top1>0.06", "fail"),
        ("top1>=6%", "inconclusive"),
        ("arc_easy_change>-1e-2", "pass"),
    ],
)
def test_the_whole_interval_must_keep_the_bound(text, verdict):
    assert gate(text).judge(INSIDE) == verdict


def test_a_figure_without_an_interval_decides_nothing():
    point = Interval(value=0.04, low=0.04, high=0.04)
    assert gate("kl<0.05").judge(point) == "pass"
    assert gate("kl<0.05").judge(point, sampled=False) == "inconclusive"


@pytest.mark.parametrize("text", ["kl", "kl=0.05", "kl<much", "kl<nan", "k1<0.05", "hellaswag>0.3"])
def test_what_is_no_bound_is_refused(text):
    with pytest.raises(ConfigError, match="--gate"):
        gate(text)


@pytest.mark.parametrize("text", ["kl<0.05", "perplexity_ratio<1.01", "arc_easy_change>0"])
def test_a_distance_needs_an_original(text):
    with pytest.raises(ConfigError, match="--against"):
        parse_gates([text], ["arc_easy"], has_original=False)


def test_every_figure_of_an_evaluation(original, changed, windows):
    quality = evaluate_model(changed, windows, original)
    loss, kl = quality.divergence.loss_over_original, quality.divergence.kl_mean
    gates = parse_gates(
        [f"kl<{kl.high * 1.1}", f"kl<{kl.low / 2}", f"perplexity_ratio<{math.exp(loss.value)}",
         "perplexity>0", "kl_p99_9>=0", "top1<=1"],
        (), has_original=True,
    )  # fmt: skip
    results = judge_gates(gates, quality, {})
    verdicts = ["pass", "fail", "inconclusive", "pass", "pass", "pass"]
    assert [result.verdict for result in results] == verdicts
    assert f"its upper end {kl.high:.4g} decides" in results[0].message
    assert f"its lower end {kl.low:.4g} decides" in results[1].message


def test_a_single_window_is_inconclusive(original, changed, windows):
    from dataclasses import replace

    one = replace(windows, tokens_NT=windows.tokens_NT[:1])
    (result,) = judge_gates(
        parse_gates(["kl<1000"], (), True), evaluate_model(changed, one, original), {}
    )
    assert result.verdict == "inconclusive"
    assert "single window" in result.message


def test_a_failed_gate_counts_before_an_undecided_one(original, changed, windows):
    quality = evaluate_model(changed, windows, original)
    kl = quality.divergence.kl_mean
    undecided, failed = f"kl<{kl.value}", f"kl<{kl.low / 2}"

    def check(*texts: str) -> None:
        raise_for_gates(judge_gates(parse_gates(texts, (), True), quality, {}), "out")

    check(f"kl<{kl.high * 2}")
    with pytest.raises(GateUndecided) as inconclusive:
        check(undecided)
    with pytest.raises(GateFailed) as broken:
        check(undecided, failed)
    assert (broken.value.exit_code, inconclusive.value.exit_code) == (4, 5)
