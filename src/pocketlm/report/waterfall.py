"""What each stage of a recipe costs: log-perplexity and KL from the original after every stage.

A few windows of the evaluation half of the builtin text: enough to see which stage does the damage,
too few to judge the result by; `pocketlm eval` is for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import eval_windows
from pocketlm.evaluate.quality import evaluate_model, score_original
from pocketlm.models import Model, open_model
from pocketlm.report.data import StageResult

WINDOWS, SEQ_LEN = 4, 512


def measure_stages(
    original: Model, stages: Iterable[tuple[str, Path]], *, trust_remote_code: bool = False
) -> tuple[StageResult, ...]:
    """Measures the original and what every stage has left, one after the other.

    Args:
        original: The first source.
        stages: Name and directory of each, in order.
        trust_remote_code: Whether code from the checkpoint may run.

    Returns:
        The original first, then each stage.

    Raises:
        CalibrationError: If the model's tokenizer makes too few tokens of the text.
    """
    text = load_text("builtin", "evaluation", original.tokenizer())
    windows = eval_windows(original.tokenizer(), text, SEQ_LEN, WINDOWS, original.context)
    base = score_original(original, windows)
    try:
        found: list[StageResult] = []
        for name, path in stages:
            model = open_model(
                path,
                device=original.device,
                compute_dtype=original.compute_dtype,
                trust_remote_code=trust_remote_code,
                allow_compressed=True,
            )
            divergence = (report := evaluate_model(model, windows, base)).divergence
            assert divergence is not None
            if not found:
                start = divergence.original_log_perplexity.value
                found.append(StageResult(name="original", log_perplexity=start, kl=0.0))
            found.append(
                StageResult(
                    name=name,
                    log_perplexity=report.log_perplexity.value,
                    kl=divergence.kl_mean.value,
                )
            )
    finally:
        base.close()
    return tuple(found)
