"""Measures models beside their original: quality, speed, answers; an artifact keeps the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pocketlm.calibration.overlap import overlap_warning
from pocketlm.calibration.record import read_hashes
from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows, eval_windows
from pocketlm.core.errors import ConfigError, GateFailed, GateUndecided, PocketLMError
from pocketlm.engine.artifact import HASHES
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.machine import choose_device
from pocketlm.evaluate import hidden
from pocketlm.evaluate.gates import GateResult, judge_gates, parse_gates, raise_for_gates
from pocketlm.evaluate.quality import evaluate_model, require_same_vocabulary, score_original
from pocketlm.evaluate.results import QualityReport, Result
from pocketlm.evaluate.speed import SpeedReport, measure_speed
from pocketlm.evaluate.tasks import TaskResult, TaskSettings, figures, run_tasks
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.models.opening import resolve
from pocketlm.report.build import LEDGER, read_ledger, write_all
from pocketlm.report.data import FOLDER, METRICS, Answer, read_metrics
from pocketlm.runtime.generate import generate
from pocketlm.runtime.load import load

ANSWER_TOKENS = 64
Source = str | Path


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
        gates: Bounds that were to be kept, with their outcome.
        tasks: What tasks say, beside the original on the same items.
        weight_bytes: Of the model's weight files.
        original_weight_bytes: Of the original's.
    """

    model: str
    against: str | None
    quality: QualityReport
    speed: SpeedReport | None
    original_speed: SpeedReport | None
    answers: tuple[Answer, ...]
    report: Path | None
    gates: tuple[GateResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    weight_bytes: int | None = None
    original_weight_bytes: int | None = None

    def gate_failure(self) -> PocketLMError | None:
        """What `raise_for_gates` would raise."""
        try:
            self.raise_for_gates()
        except (GateFailed, GateUndecided) as error:
            return error
        return None

    def raise_for_gates(self) -> None:
        """Turns a gate that is not passed into an error.

        Raises:
            GateFailed: If one is failed.
            GateUndecided: If none is failed, but one is inconclusive.
        """
        raise_for_gates(self.gates, self.model)


@dataclass(frozen=True)
class Settings:
    """How models are measured; see `pocketlm.api.evaluate`."""

    text: str | None = None
    limit: int | None = None
    seq_len: int = 2048
    prompt: str | None = None
    gates: Sequence[str] = ()
    tasks: TaskSettings | None = None
    speed: bool = True
    device: str = "cpu"
    threads: int | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        *,
        device: str = "auto",
        tasks: Sequence[str] = (),
        task_dir: Source | None = None,
        task_data: Source | None = None,
        items: int | None = None,
        margin: float = 0.01,
        cache_dir: Source | None = None,
        trust_remote_code: bool = False,
        **plain: Any,
    ) -> Settings:
        """The settings that arguments of `pocketlm.api.evaluate` stand for."""
        place, asked = str(choose_device(device)), None
        if tasks:
            directory, data, cache = (
                None if path is None else Path(path) for path in (task_dir, task_data, cache_dir)
            )
            asked = TaskSettings(
                tuple(tasks), directory, data, items, margin, cache, place, trust_remote_code
            )
        return cls(device=place, tasks=asked, trust_remote_code=trust_remote_code, **plain)


def measure(
    models: Sequence[Source],
    against: Source | None,
    settings: Settings,
    on_event: Listener | None = None,
) -> list[Measurement]:
    """Measures models on the same windows; the original is run once, however many there are.

    Args:
        models: Artifacts or sources, at least one.
        against: The original.
        settings: Text, windows, machine.
        on_event: Called with each event.

    Returns:
        What was found of each; also kept in its metrics, page and card, if it is an artifact.

    Raises:
        ConfigError: If a model has another vocabulary, reads the text as other tokens, or a gate
            cannot be judged.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    names = () if settings.tasks is None else settings.tasks.names
    gates = parse_gates(settings.gates, names, against is not None)
    log = EventLog(None, on_event)
    answered = _tasks(models, against, settings, log)
    qualities = _qualities(models, against, settings, log)
    original_speed = None if against is None else _speed(against, settings, log)
    original_said = "" if against is None else _say(against, settings, log)
    found: list[Measurement] = []
    for model, quality, tasks in zip(models, qualities, answered, strict=True):
        answers: tuple[Answer, ...] = ()
        if settings.prompt is not None:
            said = _say(model, settings, log)
            answers = (Answer(prompt=settings.prompt, original=original_said, compressed=said),)
        measurement = Measurement(
            model=str(model),
            against=None if against is None else str(against),
            quality=quality,
            speed=_speed(model, settings, log),
            original_speed=original_speed,
            answers=answers,
            report=None,
            gates=judge_gates(gates, quality, figures(tasks)),
            tasks=tasks,
            weight_bytes=_weight_bytes(model),
            original_weight_bytes=None if against is None else _weight_bytes(against),
        )
        found.append(_keep(measurement, Path(model)))
    return found


def _tasks(
    models: Sequence[Source], against: Source | None, settings: Settings, log: EventLog
) -> list[tuple[TaskResult, ...]]:
    """What tasks say of each model; first, so that a task that cannot run is told at once."""
    if settings.tasks is None:
        return [()] * len(models)
    began: dict[str, tuple[float, int]] = {}  # who answers → when, with how many known

    def step(text: str, done: int, total: int) -> None:
        if text not in began or done < began[text][1]:
            began[text] = (time.monotonic(), done)
            log.emit("stage", text, data={"stage": "evaluate"})
        started, known = began[text]
        each = (time.monotonic() - started) / max(1, done - known)
        log.emit(
            "progress", text, done=done, total=total, share=done / max(1, total),
            seconds_left=each * (total - done),
        )  # fmt: skip

    return run_tasks(models, against, settings.tasks, step)


def _qualities(
    models: Sequence[Source],
    against: Source | None,
    settings: Settings,
    log: EventLog,
) -> list[QualityReport]:
    log.emit("stage", "reading the text", data={"stage": "evaluate"})
    views = [_open(model, settings) for model in models]
    original = None if against is None else _open(against, settings)
    windows = _windows(models, views, settings)
    count, seq_len = windows.tokens_NT.shape
    streamed = [view for view in (original, *views) if view is not None]
    total = sum(hidden.steps(view, count, seq_len) for view in streamed) + len(views) * count
    steps = _Steps(log, total)
    base = None
    if original is not None:
        for view in views:
            require_same_vocabulary(view, original)
        steps.begin(f"running the original on {count} windows")
        base = score_original(original, windows, steps)
    try:
        found: list[QualityReport] = []
        for model, view in zip(models, views, strict=True):
            told = _with_overlap(Path(model), windows)
            for note in told.notes:
                log.emit("warning", note, where=str(model))
            steps.begin(f"running {Path(model).name} on {count} windows")
            found.append(
                evaluate_model(view, told, base, tokenizer=view.tokenizer(), on_progress=steps)
            )
        return found
    finally:
        if base is not None:
            base.close()


class _Steps:
    """Counts the steps of several runs as one, and tells of them as events."""

    def __init__(self, log: EventLog, total: int) -> None:
        self._log, self._total, self._finished = log, total, 0
        self._text, self._began = "", time.monotonic()

    def begin(self, text: str) -> None:
        """The next run; the first one begins when all is loaded."""
        if not self._finished:
            self._began = time.monotonic()
        self._text = text
        self._log.emit("stage", text, share=self._finished / self._total)

    def __call__(self, done: int, of: int) -> None:
        """A step of the present run."""
        so_far = self._finished + done
        left = (time.monotonic() - self._began) / so_far * (self._total - so_far)
        share = so_far / self._total
        self._log.emit("progress", self._text, done=done, total=of, share=share, seconds_left=left)
        if done == of:
            self._finished = so_far


def _open(source: Source, settings: Settings) -> Model:
    return open_model(
        source,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        allow_compressed=True,
    )


def _windows(models: Sequence[Source], views: Sequence[Model], settings: Settings) -> Windows:
    """The windows, which all tokenizers must agree on."""
    text = load_text(settings.text or "builtin", "evaluation", views[0].tokenizer())
    context = min(view.context for view in views)
    first, *others = (
        eval_windows(view.tokenizer(), text, settings.seq_len, settings.limit, context)
        for view in views
    )
    for model, other in zip(models[1:], others, strict=True):
        if other.sha256 != first.sha256:
            raise ConfigError(
                f"its tokenizer reads the text as other tokens than that of {models[0]}.",
                where=str(model),
                remedy="Compare models of one tokenizer; evaluate this one alone.",
            )
    return first


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


def _weight_bytes(source: Source) -> int:
    """Of the files that hold a model's tensors."""
    path = resolve(source)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _speed(source: Source, settings: Settings, log: EventLog) -> SpeedReport | None:
    if not settings.speed:
        return None
    log.emit("stage", f"measuring the speed of {Path(source).name}")
    return measure_speed(source, device=settings.device, threads=settings.threads)


def _say(source: Source, settings: Settings, log: EventLog) -> str:
    """What a model answers to the prompt; nothing where there is none."""
    if settings.prompt is None:
        return ""
    log.emit("stage", f"{Path(source).name} answers the prompt")
    model, tokenizer = load(source, device=settings.device)
    return generate(model, tokenizer, settings.prompt, max_new_tokens=ANSWER_TOKENS).text


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
            "tasks": found.tasks or read_metrics(artifact).tasks,
        }
    )
    return found.model_copy(update={"report": write_all(artifact, data)})
