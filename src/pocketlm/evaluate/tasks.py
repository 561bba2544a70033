"""Tasks of lm-eval's harness on a model and its original: the same items, compared in pairs.

Tasks are lm-eval's own (which come from the hub), or YAML files in a directory; those name their
data by relative paths that are looked for in the user's directory. Every answer is cached by what
it depends on: the model's content, the arithmetic, and the tokens of the question.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from pocketlm import __version__
from pocketlm.core.errors import ConfigError, SourceError, nearest
from pocketlm.engine.machine import cache_directory
from pocketlm.evaluate.bootstrap import Interval
from pocketlm.evaluate.cache import Findings, content_of, digest
from pocketlm.evaluate.gates import CHANGE
from pocketlm.evaluate.paired import (
    change_interval,
    judge,
    mcnemar,
    more_items,
    share_interval,
)
from pocketlm.evaluate.results import Comparison, TaskResult
from pocketlm.models import open_model
from pocketlm.runtime.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 0.01  # the loss of accuracy that is tolerated
PREFERRED = ("acc_norm", "acc", "exact_match")  # of a task's metrics, the first that it has

OnProgress = Callable[[str, int, int], None]  # who answers, how many questions, of how many


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Attributes:
        names: Of the tasks.
        directory: Holds their YAML files; None: lm-eval's own tasks.
        data: Directory of the files that they name.
        items: Of each task at most; None: all.
        margin: The loss that is tolerated.
        cache: Where answers are kept; None: the user's cache.
        device: Where models run.
        trust_remote_code: Whether code from a checkpoint may run.
    """

    names: tuple[str, ...]
    directory: Path | None = None
    data: Path | None = None
    items: int | None = None
    margin: float = MARGIN
    cache: Path | None = None
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answers:
    """What a model answered to the items of a task.

    Attributes:
        metric: Which score.
        scores_N: One an item, float64.
        answers: What was chosen or written, as plain data.
        items_sha256: Of the questions.
        fewshot: Examples before each.
        version: Of the task's definition.
    """

    metric: str
    scores_N: np.ndarray
    answers: tuple[Any, ...]
    items_sha256: str
    fewshot: int
    version: str


def run_tasks(
    models: Sequence[str | Path],
    against: str | Path | None,
    settings: TaskSettings,
    on_progress: OnProgress = lambda text, done, total: None,
) -> list[tuple[TaskResult, ...]]:
    """Runs tasks on models and their original, in one arithmetic; known answers are not made again.

    Args:
        models: What `pocketlm.load` takes.
        against: The original.
        settings: Which tasks, and where.
        on_progress: Called as answers come.

    Returns:
        Of each model, one result a task.

    Raises:
        ConfigError: If lm-eval is not installed, or a task is unknown or asks what is not done.
        SourceError: If a task's data are absent.
    """
    tasks = load_tasks(settings)
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    everyone = [*models] if against is None else [against, *models]
    found = [_ask(source, tasks, settings, dtype, on_progress) for source in everyone]
    original = None if against is None else found.pop(0)
    return [
        tuple(
            _result(
                name,
                answers[name],
                None if original is None else original[name],
                settings.margin,
                dtype,
            )
            for name in settings.names
        )
        for answers in found
    ]


def figures(results: Sequence[TaskResult]) -> dict[str, Interval]:
    """What gates can bound: a task's score by its name, its change behind ``_change``."""
    found = {result.task: result.score for result in results}
    for result in results:
        if result.comparison is not None:
            found[f"{result.task}{CHANGE}"] = result.comparison.change
    return found


def load_tasks(settings: TaskSettings) -> list[Any]:
    """The tasks as lm-eval knows them, from its own or from a directory.

    Raises:
        ConfigError: If lm-eval is not installed or a task unknown.
        SourceError: If a file is absent.
    """
    if (settings.items is not None and settings.items < 1) or settings.margin < 0:
        raise ConfigError("items must be at least 1, the margin at least 0.", where="--tasks")
    manager = _lm_eval("lm_eval.tasks").TaskManager
    if settings.directory is None:
        known = manager()
        _require_known(settings.names, list(known.all_tasks))
        return list(settings.names)
    files = {path.stem: path for path in sorted(settings.directory.glob("*.yaml"))}
    _require_known(settings.names, list(files))
    return [_local(files[name], settings.data) for name in settings.names]


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks run through lm-eval, which is not installed ({error.name}).",
            where="--tasks",
            remedy="Run: pip install 'pocketlm[eval]'",
        ) from error


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no task '{name}'.", where="--tasks", remedy=nearest(name, known)
            )


def _local(path: Path, data: Path | None) -> dict[str, Any]:
    """A task of a YAML file, its data files found."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
        files = config["dataset_kwargs"]["data_files"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            "is no task with dataset_kwargs: {data_files: …}.",
            where=str(path),
            remedy="See benchmarks/tasks for examples.",
        ) from error
    for split, name in files.items():
        file = (path.parent if data is None else data) / name
        if not file.is_file():
            raise SourceError(
                "does not exist.", where=str(file), remedy="Name its directory with --task-data."
            )
        files[split] = str(file.resolve())
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's log to what went wrong, and its bars and those of datasets away."""
    logger, datasets = logging.getLogger("lm_eval"), _lm_eval("datasets")
    questions = _lm_eval("lm_eval.api.task")
    level, bar = logger.level, questions.tqdm
    logger.setLevel(logging.ERROR)
    questions.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        questions.tqdm = bar
        datasets.enable_progress_bars()


def _ask(
    source: str | Path,
    tasks: Sequence[Any],
    settings: TaskSettings,
    dtype: torch.dtype,
    on_progress: OnProgress,
) -> dict[str, Answers]:
    """Every answer of a model, by task."""
    view = open_model(source, trust_remote_code=settings.trust_remote_code, allow_compressed=True)
    context = {
        "pocketlm": __version__,
        "model": content_of(source, view.source.fingerprint()),
        "dtype": str(dtype),
        "device": torch.device(settings.device).type,
    }
    findings = Findings(settings.cache or cache_directory("tasks"), context)

    def model() -> PreTrainedModel:
        return load(
            source, device=settings.device, dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
        )[0]  # fmt: skip

    asked = f"{Path(source).name} answers {', '.join(settings.names)}"
    harness = _lm_eval("pocketlm.evaluate.harness").HarnessModel(
        model, view.tokenizer(), view.context, findings,
        lambda done, total: on_progress(asked, done, total),
    )  # fmt: skip
    managers, evaluator = _lm_eval("lm_eval.tasks"), _lm_eval("lm_eval.evaluator")
    with _quiet():
        found = evaluator.simple_evaluate(
            harness,
            tasks=list(tasks),
            limit=settings.items,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=managers.TaskManager(include_defaults=settings.directory is None),
        )
    return {
        name: _answers(found["samples"][name], found["configs"][name], found["n-shot"][name])
        for name in settings.names
    }


def _answers(
    samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any], fewshot: int
) -> Answers:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = sorted(
        (sample for sample in samples if sample["filter"] == filters[-1]),
        key=lambda sample: sample["doc_id"],
    )
    metrics = chosen[0]["metrics"]
    metric = next((name for name in PREFERRED if name in metrics), metrics[0])
    asked = [
        [sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]] for sample in chosen
    ]
    name = metric if filters[-1] == "none" else f"{metric} ({filters[-1]})"
    return Answers(
        metric=name,
        scores_N=np.array([float(sample[metric]) for sample in chosen]),
        answers=tuple(_answer(sample, metric) for sample in chosen),
        items_sha256=digest(asked),
        fewshot=int(fewshot),
        version=str((config.get("metadata") or {}).get("version", "unknown")),
    )


def _answer(sample: Mapping[str, Any], metric: str) -> Any:
    """The chosen continuation's index, by the score that the metric ranks by; else the text."""
    given = sample["filtered_resps"]
    if not isinstance(given[0], list | tuple):
        return json.dumps(given)
    nats = np.array([float(pair[0]) for pair in given])
    if metric == "acc_norm":
        choices = [continuation for _, continuation in sample["arguments"]]
        nats = nats / np.array([float(len(choice.removeprefix(" "))) for choice in choices])
    return int(nats.argmax())


def _result(
    name: str, answers: Answers, original: Answers | None, margin: float, dtype: torch.dtype
) -> TaskResult:
    comparison = None
    if original is not None:
        if original.items_sha256 != answers.items_sha256:
            raise ConfigError(
                "the two models were asked different items.",
                where=name,
                remedy="A task that samples its examples needs a fixed seed.",
            )
        ours, theirs = answers.scores_N, original.scores_N
        change = change_interval(ours, theirs)
        verdict = judge(change, margin)
        undecided = verdict == "inconclusive"
        comparison = Comparison(
            original=share_interval(theirs),
            change=change,
            p_value=mcnemar(ours, theirs),
            flips=sum(a != b for a, b in zip(answers.answers, original.answers, strict=True)),
            gained=int((ours > theirs).sum()),
            lost=int((ours < theirs).sum()),
            verdict=verdict,
            margin=margin,
            more_items=more_items(change, len(ours), margin) if undecided else None,
        )
    return TaskResult(
        task=name,
        metric=answers.metric,
        items=len(answers.scores_N),
        fewshot=answers.fewshot,
        items_sha256=answers.items_sha256,
        score=share_interval(answers.scores_N),
        comparison=comparison,
        versions={"task": answers.version, "lm-eval": _version("lm-eval")},
        compute_dtype=str(dtype).removeprefix("torch."),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
