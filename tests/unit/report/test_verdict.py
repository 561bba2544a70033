"""The verdict follows its rule: the interval's upper end, and regressions before it."""

import math

import pytest

from pocketlm.evaluate.bootstrap import Interval
from pocketlm.report.data import ReportData
from pocketlm.report.verdict import verdict


def with_loss(data: ReportData, value: float, high: float) -> ReportData:
    """The same, its loss over the original another."""
    assert data.quality is not None
    assert data.quality.divergence is not None
    loss = Interval(value=math.log1p(value), low=0.0, high=math.log1p(high))
    divergence = data.quality.divergence.model_copy(update={"loss_over_original": loss})
    quality = data.quality.model_copy(update={"divergence": divergence})
    return data.model_copy(update={"quality": quality, "tasks": ()})


@pytest.mark.parametrize(
    ("value", "high", "word", "tone"),
    [
        (0.004, 0.009, "Nearly lossless", "good"),
        (0.004, 0.012, "Small loss", "good"),  # the interval's end decides
        (0.04, 0.06, "Clear loss", "fair"),
        (0.1, 0.3, "Heavy loss", "bad"),
        (9.0, 99.0, "Heavy loss", "bad"),
    ],
)
def test_the_upper_end_decides(full, value, high, word, tone):
    found = verdict(with_loss(full, value, high))
    assert (found.word, found.tone) == (word, tone)


def test_a_regression_outweighs_a_small_loss(full):
    good = with_loss(full, 0.001, 0.002).model_copy(update={"tasks": full.tasks})
    assert verdict(good).word == "Regression on arc_easy"
    assert verdict(good).tone == "bad"
    assert "Tasks beside the original: 1 regression." in verdict(good).reasons


def test_reasons_are_what_was_measured(full, bare):
    size, quality, tasks, speed = verdict(full).reasons
    assert size == "2.42× smaller: 269 MB became 111 MB."
    assert quality.startswith(
        "Perplexity +4.74 % over the original (95 %: +4.26 to +5.22 %); 91.2 %"
    )
    assert tasks
    assert speed.startswith(
        "Decodes 2.49× and reads prompts 2.49× as fast as the original on Some Processor"
    )
    assert verdict(bare).tone == "open"
    assert len(verdict(bare).reasons) == 2
    alone = full.quality.model_copy(update={"divergence": None})
    told = verdict(bare.model_copy(update={"quality": alone}))
    assert (told.tone, told.word) == ("open", "Not judged yet")
    assert "no original beside it" in told.reasons[1]
