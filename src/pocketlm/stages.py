"""Recipes that make a smaller model first: one stage after another, each with a complete result.

A transform (depth, width, rotation, experts) is a barrier: its result is an ordinary checkpoint in
the work directory, which the next stage takes as its source. Linear, fold and block steps after the
last transform are one stage, run as any compression is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pocketlm import catalog
from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Recipe, StepSpec
from pocketlm.engine.compress import earlier_samples, finished_ledger
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Ledger, StageAccount
from pocketlm.engine.machine import available_ram_bytes, choose_device
from pocketlm.engine.options import Job
from pocketlm.engine.order import check_order
from pocketlm.engine.plan import Plan, refuse_impossible
from pocketlm.engine.transform import run_transform
from pocketlm.engine.transform_plan import plan_transform
from pocketlm.formats.capabilities import target_name
from pocketlm.models import Model, open_model
from pocketlm.models.opening import reopen
from pocketlm.models.outline import ModelOutline
from pocketlm.prepare import (
    BATCH_TOKENS,
    CPU_SECONDS,
    MIN_SAMPLES,
    SAMPLES,
    SEQ_LEN,
    name_of,
)
from pocketlm.runtime.calibration_windows import calibration_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORM = "transform"
NOTHING = Changes({}, (), {})
LEDGERS = "pocketlm/stages"


def has_transforms(recipe: Recipe) -> bool:
    """Whether a recipe makes a smaller model."""
    return any(_kind(step) == TRANSFORM for step in recipe.steps)


def split(recipe: Recipe) -> tuple[tuple[StepSpec, ...], Recipe | None]:
    """The transforms of a recipe, and what is left for the last stage.

    Raises:
        ConfigError: If a transform comes after a step of another kind, or what is left cannot work.
    """
    transforms = tuple(step for step in recipe.steps if _kind(step) == TRANSFORM)
    if tuple(recipe.steps[: len(transforms)]) != transforms:
        late = next(s for s in recipe.steps[::-1] if _kind(s) == TRANSFORM)
        raise ConfigError(
            f"'{late.method}' changes shapes and would undo what earlier steps made.",
            where="recipe",
            remedy=f"Put '{late.method}' first.",
        )
    if len(transforms) == len(recipe.steps):
        return transforms, None
    rest = recipe.model_copy(update={"steps": recipe.steps[len(transforms) :]})
    check_order(rest, [catalog.build_step(step.method, step.options) for step in rest.steps])
    return transforms, rest


def _kind(step: StepSpec) -> str:
    return catalog.method_class(step.method).kind


@dataclass(frozen=True)
class Reduced:
    """What the transforms of a recipe have left.

    Attributes:
        original: The first source.
        path: Where the smaller model is: a directory in the work directory, or the output.
        accounts: Of every transform.
        ledgers: File of the artifact → the ledger of a stage, for all but the last.
        fingerprint: What the whole chain depends on; for the last stage's own.
        plans: Of every transform.
        places: What every transform has made.
        work_dir: Of the last stage.
        rest: What is left to do; None: the output is complete.
        journal: Holds the lock of the whole run.
        trust_remote_code: Whether code from the checkpoint may run.
    """

    original: Model
    path: Path
    accounts: tuple[StageAccount, ...]
    ledgers: dict[str, bytes]
    fingerprint: dict[str, Any]
    plans: list[Plan]
    places: list[Path]
    work_dir: Path
    rest: Recipe | None
    journal: Journal
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Settings:
    """Options of `compress` that a transform stage heeds; see `pocketlm.prepare.prepare`."""

    calibration: str = "builtin"
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    target: str = "transformers"
    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    work_dir: str | Path | None = None
    activation_budget_bytes: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def directory(self, output: Path) -> Path:
        """Where the unfinished run lives."""
        if self.work_dir:
            return Path(self.work_dir)
        return output.with_name(f"{output.name}.pocketlm-work")

    def job(self, model: Model, source: str, recipe: Recipe, output: Path, work_dir: Path) -> Job:
        """A stage as a job."""
        seq_len = min(self.seq_len or SEQ_LEN, model.context)
        return Job(
            source=source,
            recipe=recipe,
            steps=(),
            output=output,
            work_dir=work_dir,
            target=target_name(self.target),
            tokens_at_once=max(seq_len, BATCH_TOKENS[model.device.type] // seq_len * seq_len),
            activation_bytes=self.activation_budget_bytes
            or min(4 << 30, available_ram_bytes() // 4),
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            seed=self.seed,
        )


def open_original(source: str | Path | PreTrainedModel, settings: Settings) -> Model:
    """The first source, with threads and device set."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return open_model(
        source,
        device=choose_device(settings.device),
        trust_remote_code=settings.trust_remote_code,
        revision=settings.revision,
    )


def plan_stages(
    model: Model, source: str, recipe: Recipe, output: Path, settings: Settings
) -> tuple[list[Plan], Model]:
    """Predicts the transforms of a recipe without reading a weight.

    Returns:
        A plan of each, and a view of the smaller model, of the right sizes, for what follows.
    """
    plans: list[Plan] = []
    for step in split(recipe)[0]:
        transform = catalog.build_step(step.method, step.options)
        changes = transform.changes(ModelOutline(model), None)
        smaller = reopen(model, changes)
        job = settings.job(model, source, recipe, output, settings.directory(output))
        count, seq_len = _sizes(model, transform, settings, job, None)
        plans.append(plan_transform(model, smaller, job, changes, count, seq_len))
        model = smaller
    return plans, model


def _sizes(
    model: Model, transform: Any, settings: Settings, job: Job, settled: int | None
) -> tuple[int, int]:
    """Windows and tokens of each; fewer windows on a CPU where that saves much of a long pass."""
    seq_len = min(settings.seq_len or SEQ_LEN, model.context)
    if not transform.needs_data:
        return 0, seq_len
    count = settings.samples or settled or SAMPLES
    if settings.samples is None and settled is None and model.device.type == "cpu":
        while count > MIN_SAMPLES:
            if plan_transform(model, model, job, NOTHING, count, seq_len).seconds <= CPU_SECONDS:
                break
            count //= 2
    return count, seq_len


def reduce(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
    on_event: Listener | None,
    settings: Settings,
) -> Reduced | Ledger:
    """Runs the transforms of a recipe, or goes on where an earlier attempt stopped.

    Args:
        source: As for `pocketlm.compress`.
        recipe: Its first steps are transforms.
        output: Where the artifact goes.
        resume: Whether what lies in the work directory counts.
        on_event: Called with each event.
        settings: The other options.

    Returns:
        The smaller model, or the ledger where the very same artifact is in place already.

    Raises:
        PocketLMError: If something cannot be read, or cannot work.
    """
    transforms, rest = split(recipe)
    model = original = open_original(source, settings)
    chain = {"chain": _fingerprint(model, recipe, settings)}
    done = finished_ledger(output)
    if done is not None and resume and done.fingerprint.get("chain") == chain["chain"]:
        return done
    directory = settings.directory(output)
    journal = Journal(directory, chain, restart=not resume)
    try:
        accounts: list[StageAccount] = []
        ledgers: dict[str, bytes] = {}
        plans: list[Plan] = []
        places: list[Path] = []
        place = output
        for number, step in enumerate(transforms, 1):
            last = rest is None and number == len(transforms)
            place = output if last else directory / f"stage{number}" / "model"
            job = settings.job(
                model,
                name_of(source),
                recipe if last else recipe.model_copy(update={"steps": (step,)}),
                place,
                directory / f"stage{number}" / "work",
            )
            job = replace(
                job, fingerprint=chain, stages=tuple(accounts), stage_ledgers=dict(ledgers)
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            transform = catalog.build_step(step.method, step.options)
            settled = earlier_samples(place, job.work_dir)
            count, seq_len = _sizes(model, transform, settings, job, settled)
            outline = ModelOutline(model)
            changes = transform.changes(outline, None)  # refuses what cannot be before any work
            plan = plan_transform(model, reopen(model, changes), job, changes, count, seq_len)
            plans.append(plan)
            refuse_impossible(plan, output, model.device)
            windows = (
                calibration_windows(
                    model, source, settings.calibration, count, seq_len, settings.seed,
                    EventLog(None, on_event), trust_remote_code=settings.trust_remote_code,
                    revision=settings.revision,
                )
                if transform.needs_data
                else None
            )  # fmt: skip
            ledger = run_transform(
                model, outline, transform, job, windows, restart=last and not resume,
                listener=on_event, planned=plan.seconds,
            )  # fmt: skip
            accounts = ledger.stages
            places.append(place)
            ledgers[f"{LEDGERS}/{number}-{step.method}.json"] = (
                place / "pocketlm" / "ledger.json"
            ).read_bytes()
            if not last:
                model = open_original(place, replace(settings, revision=None))
    except BaseException:
        journal.release()
        raise
    return Reduced(
        original,
        place,
        tuple(accounts),
        ledgers,
        chain,
        plans,
        places,
        directory / "last",
        rest,
        journal,
        settings.trust_remote_code,
    )


def _fingerprint(model: Model, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """What the bytes of the whole chain depend on, as far as the command says it."""
    asked = {k: v for k, v in vars(settings).items() if k not in ("work_dir", "device")}
    told = json.dumps([recipe.model_dump(mode="json"), asked], sort_keys=True, default=str)
    return {
        "source": model.source.fingerprint(),
        "asked": hashlib.sha256(told.encode()).hexdigest(),
        "recipe": [step.method for step in recipe.steps],
    }


def joined(plans: list[Plan]) -> Plan:
    """The plan of all stages: the last one's, with the time and the needs of all."""
    last = plans[-1]
    stages = {
        name: sum(plan.stages.get(name, 0.0) for plan in plans)
        for name in dict.fromkeys(name for plan in plans for name in plan.stages)
    }
    between = [plan.output_bytes for plan in plans[:-1]]
    return last.model_copy(
        update={
            "source": plans[0].source,
            "method": plans[0].method if len(plans) == 1 else _methods(plans),
            "source_bytes": plans[0].source_bytes,
            "peak_ram_bytes": max(plan.peak_ram_bytes for plan in plans),
            "peak_vram_bytes": max(plan.peak_vram_bytes for plan in plans),
            "disk_transient_bytes": last.disk_transient_bytes + sum(between),
            "seconds": sum(plan.seconds for plan in plans),
            "stages": stages,
            "smaller": [line for plan in plans for line in plan.smaller],
            "warnings": list(dict.fromkeys(w for plan in plans for w in plan.warnings)),
        }
    )


def _methods(plans: list[Plan]) -> str:
    return " → ".join(dict.fromkeys(_each(plans)))


def _each(plans: list[Plan]) -> Iterator[str]:
    for plan in plans:
        yield from plan.method.split(" → ")
