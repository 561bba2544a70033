"""What a report says first: how good the result is, by a rule that the page states.

The word comes from the far end of the loss's 95 % interval, as a share of perplexity, so that a
short evaluation is never flattering; a task that got worse outweighs it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from pocketlm.evaluate.results import TaskResult
from pocketlm.report.data import ReportData
from pocketlm.report.words import bytes_text, number_text, percent_text, signed_text

# Perplexity over the original's, at the interval's upper end → word and tone.
STEPS = (
    (0.01, "Nearly lossless", "good"),
    (0.05, "Small loss", "good"),
    (0.15, "Clear loss", "fair"),
    (math.inf, "Heavy loss", "bad"),
)
RULE = (
    "Judged by the upper end of the 95 % interval of perplexity over the original's: nearly "
    "lossless below 1 %, small below 5 %, clear below 15 %, heavy above; a regression on a task "
    "outweighs it."
)


@dataclass(frozen=True)
class Verdict:
    """The first lines of a report.

    Attributes:
        word: Such as ``Small loss``.
        tone: ``good``, ``fair``, ``bad`` or, without an original to compare with, ``open``.
        reasons: Sentences: size, quality, tasks, speed, as far as they were measured.
    """

    word: str
    tone: str
    reasons: tuple[str, ...]


def verdict(data: ReportData) -> Verdict:
    """Judges a result by what was measured of it.

    Args:
        data: All of it.
    """
    reasons = (_size(data), _quality(data), _tasks(data), _speed(data))
    word, tone = _judged(data)
    return Verdict(word, tone, tuple(reason for reason in reasons if reason))


def _judged(data: ReportData) -> tuple[str, str]:
    worse = [task.task for task in _compared(data) if _outcome(task) == "regression"]
    if worse:
        return f"Regression on {', '.join(worse)}", "bad"
    divergence = data.quality.divergence if data.quality else None
    if divergence is None:
        return "Not judged yet", "open"
    most = math.expm1(divergence.loss_over_original.high)
    return next((word, tone) for bound, word, tone in STEPS if most < bound)


def _size(data: ReportData) -> str:
    ratio = data.original_bytes / max(data.compressed_bytes, 1)
    before, after = bytes_text(data.original_bytes), bytes_text(data.compressed_bytes)
    return f"{number_text(ratio)}× smaller: {before} became {after}."


def _quality(data: ReportData) -> str:
    if data.quality is None:
        return "Quality has not been measured yet: run pocketlm eval."
    divergence = data.quality.divergence
    if divergence is None:
        return f"Perplexity is {number_text(data.quality.perplexity)}; no original beside it."
    loss = divergence.loss_over_original
    value, low, high = (100 * math.expm1(x) for x in (loss.value, loss.low, loss.high))
    return (
        f"Perplexity {signed_text(value)} % over the original (95 %: {signed_text(low)} to "
        f"{signed_text(high)} %); {percent_text(divergence.top1_agreement.value)} of the "
        "next-token choices are the same."
    )


def _tasks(data: ReportData) -> str:
    outcomes = Counter(map(_outcome, _compared(data)))
    if not outcomes:
        return ""
    listed = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return f"Tasks beside the original: {listed}."


def _speed(data: ReportData) -> str:
    after, before = data.speed, data.original_speed
    if after is None or before is None:
        return ""
    decode = after.decode_tokens_per_second / before.decode_tokens_per_second
    prefill = after.prefill_tokens_per_second / before.prefill_tokens_per_second
    said = f"Decodes {number_text(decode)}× and reads prompts {number_text(prefill)}× as fast as "
    said += f"the original on {after.hardware}"
    if after.peak_memory_bytes and before.peak_memory_bytes:
        share = after.peak_memory_bytes / before.peak_memory_bytes
        said += f", in {number_text(share)}× its memory"
    return f"{said}."


def _compared(data: ReportData) -> list[TaskResult]:
    return [task for task in data.tasks if task.comparison is not None]


def _outcome(task: TaskResult) -> str:
    return "" if task.comparison is None else task.comparison.verdict
