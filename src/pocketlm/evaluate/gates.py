"""Bounds that a figure must keep, such as ``kl<0.05``, judged by the far end of its interval.

A gate is passed where the whole 95 % interval keeps the bound, failed where none of it does, and
inconclusive where the bound lies inside: more windows or items would decide. A figure without an
interval (one window) decides nothing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pocketlm.core.errors import ConfigError, GateFailed, GateUndecided, nearest
from pocketlm.evaluate.bootstrap import Interval
from pocketlm.evaluate.results import Divergence, QualityReport, Result

Verdict = Literal["pass", "fail", "inconclusive"]
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip

PERPLEXITY = "perplexity"  # the one figure of quality that needs no original
DIVERGENCES: dict[str, Callable[[Divergence], Interval]] = {
    "kl": lambda d: d.kl_mean,
    "kl_median": lambda d: d.kl_median,
    "kl_p90": lambda d: d.kl_p90,
    "kl_p99": lambda d: d.kl_p99,
    "kl_p99_9": lambda d: d.kl_p99_9,
    "loss": lambda d: d.loss_over_original,
    "perplexity_ratio": lambda d: _exponential(d.loss_over_original),
    "top1": lambda d: d.top1_agreement,
}
CHANGE = "_change"  # behind a task's name: accuracy minus the original's
_FORM = re.compile(r"\s*(\w+)\s*([<>]=?)\s*(\S+)\s*")


class Gate(Result):
    """A bound on one figure.

    Attributes:
        metric: A key of `DIVERGENCES`, ``perplexity``, a task, or a task with ``_change``.
        operator: A key of `OPERATORS`: how the figure must stand to the bound.
        bound: In the figure's unit; accuracies and top-1 agreement are shares.
    """

    metric: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"

    def judge(self, figure: Interval, sampled: bool = True) -> Verdict:
        """What an interval says about the bound.

        Args:
            figure: With its interval.
            sampled: False where one window alone was measured: it has no interval.
        """
        holds = OPERATORS[self.operator]
        kept = [holds(end, self.bound) for end in (figure.low, figure.high)]
        if not sampled or kept[0] != kept[1]:
            return "inconclusive"
        return "pass" if kept[0] else "fail"


class GateResult(Result):
    """A gate and its outcome.

    Attributes:
        gate: As it was asked, such as ``kl<0.05``.
        figure: What was measured.
        verdict: Of the whole interval.
        message: The outcome as a sentence.
    """

    gate: str
    figure: Interval
    verdict: Verdict
    message: str


def parse_gates(texts: Sequence[str], tasks: Sequence[str], has_original: bool) -> list[Gate]:
    """Reads gates, before anything is measured.

    Args:
        texts: Such as ``kl<0.05`` or ``hellaswag_change>-0.01``.
        tasks: Names of the tasks that will be scored.
        has_original: Whether the model is compared with an original.

    Raises:
        ConfigError: If one has another form, an unknown figure, or one that will not be measured.
    """
    changes = [f"{task}{CHANGE}" for task in tasks]
    known = [PERPLEXITY, *DIVERGENCES, *tasks, *changes]
    found: list[Gate] = []
    for text in texts:
        form = _FORM.fullmatch(text)
        bound = None if form is None else _number(form[3])
        if form is None or bound is None:
            raise ConfigError(
                "is not a bound on a figure.",
                where=f"--gate '{text}'",
                remedy="Write it as 'kl<0.05' or 'top1>0.9', in quotes.",
            )
        metric = form[1]
        if metric not in known:
            raise ConfigError(
                f"no figure '{metric}' is measured.",
                where=f"--gate '{text}'",
                remedy=f"{nearest(metric, known)} A task's name needs --tasks.",
            )
        if not has_original and (metric in DIVERGENCES or metric in changes):
            raise ConfigError(
                f"'{metric}' is a distance from the original.",
                where=f"--gate '{text}'",
                remedy="Name the original with --against.",
            )
        found.append(Gate(metric=metric, operator=form[2], bound=bound))
    return found


def judge_gates(
    gates: Sequence[Gate], quality: QualityReport, tasks: Mapping[str, Interval]
) -> tuple[GateResult, ...]:
    """Judges every gate.

    Args:
        gates: From `parse_gates`.
        quality: Of the model.
        tasks: Task, or task with ``_change`` → its figure.
    """
    figures: dict[str, Interval] = {PERPLEXITY: _exponential(quality.log_perplexity)}
    if quality.divergence is not None:
        figures |= {name: pick(quality.divergence) for name, pick in DIVERGENCES.items()}
    one_window = quality.protocol.windows == 1
    found: list[GateResult] = []
    for gate in gates:
        of_task = gate.metric in tasks
        figure = tasks[gate.metric] if of_task else figures[gate.metric]
        sampled = of_task or not one_window
        verdict = gate.judge(figure, sampled)
        message = _sentence(gate, figure, verdict, sampled)
        found.append(GateResult(gate=str(gate), figure=figure, verdict=verdict, message=message))
    return tuple(found)


def raise_for_gates(results: Sequence[GateResult], where: str) -> None:
    """Turns gates that are not passed into an error; a failed one counts before an undecided one.

    Raises:
        GateFailed: If one is failed.
        GateUndecided: If none is failed, but one is inconclusive.
    """
    failed = [result for result in results if result.verdict == "fail"]
    undecided = [result for result in results if result.verdict == "inconclusive"]
    if failed:
        raise GateFailed(
            " ".join(result.message for result in failed),
            where=where,
            remedy="Give the model more bits, or `pocketlm bisect` to see which layers hurt.",
        )
    if undecided:
        raise GateUndecided(
            " ".join(result.message for result in undecided),
            where=where,
            remedy="Measure more: a longer --text, a higher --limit, more items of a task.",
        )


def _sentence(gate: Gate, figure: Interval, verdict: Verdict, sampled: bool) -> str:
    measured = f"{gate.metric} is {figure.value:.4g}, 95 % interval {figure.low:.4g} to "
    measured += f"{figure.high:.4g}"
    if not sampled:
        return f"{gate} is inconclusive: {gate.metric} is {figure.value:.4g} on a single window."
    if verdict == "inconclusive":
        return f"{gate} is inconclusive: {measured}, holds the bound."
    upper = gate.operator.startswith("<") == (verdict == "pass")
    end = figure.high if upper else figure.low
    word = "passed" if verdict == "pass" else "failed"
    return (
        f"{gate} is {word}: {measured}; its {'upper' if upper else 'lower'} end {end:.4g} decides."
    )


def _exponential(figure: Interval) -> Interval:
    return Interval(
        value=math.exp(figure.value), low=math.exp(figure.low), high=math.exp(figure.high)
    )


def _number(text: str) -> float | None:
    """A finite number, or a share such as ``90%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
