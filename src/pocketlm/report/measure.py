"""Measures a model beside its original: quality, speed, answers; an artifact keeps the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pocketlm.calibration.overlap import overlap_warning
from pocketlm.calibration.record import read_hashes
from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows, eval_windows
from pocketlm.engine.artifact import HASHES
from pocketlm.evaluate.quality import OnProgress, evaluate_model
from pocketlm.evaluate.results import QualityReport, Result
from pocketlm.evaluate.speed import SpeedReport, measure_speed
from pocketlm.models import open_model
from pocketlm.report.build import LEDGER, read_ledger, write_all
from pocketlm.report.data import FOLDER, METRICS, Answer, read_metrics
from pocketlm.runtime.generate import generate
from pocketlm.runtime.load import load

ANSWER_TOKENS = 64


class Measurement(Result):
    """What one evaluation found.

    Attributes:
        model: As the user named it.
        against: The original; None where none was given.
        quality: Perplexity, and the distance from the original.
        speed: Of the model; None where it was not asked for.
        original_speed: Of the original.
        answers: The prompt, answered greedily by both.
        report: The page, where the model is an artifact of ours.
    """

    model: str
    against: str | None
    quality: QualityReport
    speed: SpeedReport | None
    original_speed: SpeedReport | None
    answers: tuple[Answer, ...]
    report: Path | None


def measure(
    model: str | Path,
    against: str | Path | None,
    *,
    text: str | None,
    limit: int | None,
    seq_len: int,
    prompt: str | None,
    speed: bool,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    on_progress: OnProgress | None,
) -> Measurement:
    """Measures; see `pocketlm.api.evaluate` for the arguments.

    Returns:
        What was found; also kept in the artifact's metrics, page and card, if it is one of ours.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    options = {"device": device, "trust_remote_code": trust_remote_code}
    measured = open_model(model, allow_compressed=True, **options)
    original = None if against is None else open_model(against, allow_compressed=True, **options)
    tokenizer = measured.tokenizer()
    source = load_text(text or "builtin", "evaluation", tokenizer)
    windows = eval_windows(tokenizer, source, seq_len, limit, measured.context)
    windows = _with_overlap(Path(model), windows)
    quality = evaluate_model(
        measured, windows, original, tokenizer=tokenizer, on_progress=on_progress
    )
    speeds: list[SpeedReport | None] = [None, None]
    if speed:
        speeds[0] = measure_speed(model, device=device, threads=threads)
        if against is not None:
            speeds[1] = measure_speed(against, device=device, threads=threads)
    answers = () if prompt is None else (_answers(model, against, prompt, device),)
    found = Measurement(
        model=str(model),
        against=None if against is None else str(against),
        quality=quality,
        speed=speeds[0],
        original_speed=speeds[1],
        answers=answers,
        report=None,
    )
    return _keep(found, Path(model))


def _with_overlap(artifact: Path, windows: Windows) -> Windows:
    """The windows, with a warning where the artifact was calibrated on what they hold."""
    if not (artifact / HASHES).is_file() or not (artifact / FOLDER / LEDGER).is_file():
        return windows
    account = read_ledger(artifact).calibration
    if account is None:
        return windows
    known = read_hashes((artifact / HASHES).read_bytes())
    found = overlap_warning(account.text_name, account.text_sha256, known, windows)
    return windows if found is None else replace(windows, notes=(*windows.notes, found))


def _answers(model: str | Path, against: str | Path | None, prompt: str, device: str) -> Answer:
    said = ["", ""]
    for index, source in enumerate((against, model)):
        if source is not None:
            loaded, tokenizer = load(source, device=device)
            said[index] = generate(loaded, tokenizer, prompt, max_new_tokens=ANSWER_TOKENS).text
    return Answer(prompt=prompt, original=said[0], compressed=said[1])


def _keep(found: Measurement, artifact: Path) -> Measurement:
    """Puts the figures into an artifact's report, where there is one."""
    if found.against is None or not (artifact / FOLDER / METRICS).exists():
        return found
    data = read_metrics(artifact).model_copy(
        update={
            "quality": found.quality,
            "speed": found.speed,
            "original_speed": found.original_speed,
            "answers": found.answers,
        }
    )
    return found.model_copy(update={"report": write_all(artifact, data)})
