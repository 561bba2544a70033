"""From what a caller asks to a job: model, grids, calibration windows and the plan of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pocketlm import catalog
from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import Recipe, StepSpec
from pocketlm.engine.compress import earlier_samples
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.grids import (
    Grids,
    choose_grids,
    factors_note,
    pruning_step,
    sparsity_note,
)
from pocketlm.engine.ledger import StageAccount
from pocketlm.engine.machine import available_ram_bytes, choose_device, kernels_note
from pocketlm.engine.memory import hidden_width
from pocketlm.engine.mixture import with_mixture
from pocketlm.engine.options import Job
from pocketlm.engine.order import check_order
from pocketlm.engine.plan import Plan, make_plan
from pocketlm.engine.survey import shares
from pocketlm.formats.capabilities import target_name
from pocketlm.formats.gguf_hold import holding_type
from pocketlm.formats.proofs import grid_names, judge
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.models.shortcut import shortcuts_note
from pocketlm.recipes import END_STEPS
from pocketlm.runtime.calibration_windows import OWN_TEXT, calibration_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES, SEQ_LEN = 128, 2048
CPU_SECONDS = 1800  # a longer plan on a CPU gets fewer samples by default
MIN_SAMPLES = 16
WORTH_HALVING = 0.8  # of the time: half the samples must save a fifth
BATCH_TOKENS = {"cpu": 4096, "cuda": 8192}


@dataclass(frozen=True)
class Prepared:
    """A job with everything it needs, before the first weight is read.

    Attributes:
        model: The original.
        job: What is done to it.
        grids: Grid of every linear.
        windows: Calibration data; None where nothing needs any.
        plan: What the run is predicted to take.
        seconds: What preparing took.
    """

    model: Model
    job: Job
    grids: Grids
    windows: Windows | None
    plan: Plan
    seconds: float = 0.0


@dataclass(frozen=True)
class After:
    """What stages before the last one hand on to it.

    Attributes:
        source: The first source, as the user named it.
        recipe: Of all stages; None: this one is all.
        stages: What they did.
        stage_ledgers: File of the artifact → the ledger of a stage.
        fingerprint: What the whole chain depends on.
    """

    source: str
    recipe: Recipe | None = None
    stages: tuple[StageAccount, ...] = ()
    stage_ledgers: Mapping[str, bytes] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def prepare(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
    warnings: tuple[str, ...] = (),
    calibration: str = "builtin",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    target: str = "transformers",
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    work_dir: str | Path | None = None,
    activation_budget_bytes: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    only_plan: bool = False,
    on_event: Listener | None = None,
    model: Model | None = None,
    after: After | None = None,
) -> Prepared:
    """Opens the model, settles what is left open, draws the calibration text and plans.

    Args:
        source: As for `pocketlm.compress`, like all that follows.
        recipe: What to do.
        output: Where the artifact goes.
        resume: Whether an earlier attempt's number of samples counts.
        warnings: For the ledger, of what came before.
        calibration: What `load_text` takes, or ``self``: text that the model writes.
        samples: Windows; None: 128, fewer on a CPU where that saves much of a long run.
        seq_len: Tokens of each; None: 2048, or the model's context.
        seed: Of the windows.
        target: Engine that must load the result.
        device: Where blocks compute.
        dtype: Of the tensors that are kept.
        threads: CPU threads.
        work_dir: Where an unfinished run lives.
        activation_budget_bytes: What activations may take of the RAM; the rest is on disk.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        only_plan: Whether nothing will run: then no model is made to write text.
        on_event: Called with each event.
        model: The source, where it is open already.
        after: What earlier stages have to hand on.

    Raises:
        PocketLMError: If something cannot be read, or cannot work.
    """
    steps = tuple(catalog.build_step(step.method, step.options) for step in recipe.steps)
    check_order(recipe, steps)
    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device)
    if model is None:
        model = open_model(
            source, device=place, trust_remote_code=trust_remote_code, revision=revision
        )
    after = after or After(source=name_of(source))
    target, recipe = target_name(target), with_mixture(recipe, model)
    shapes = model.linear_shapes()
    refusal = model.packing_refusal(target)
    grids = choose_grids(
        shapes, refusal is not None, recipe, target, steps, model.ends(), model.shortcuts
    )
    proof = _proof(model, grids, target)
    seq_len = min(seq_len or SEQ_LEN, model.context)
    job = Job(
        source=after.source,
        recipe=recipe,
        steps=steps,
        output=output,
        work_dir=Path(work_dir) if work_dir else output.with_name(f"{output.name}.pocketlm-work"),
        target=target,
        tokens_at_once=max(seq_len, BATCH_TOKENS[place.type] // seq_len * seq_len),
        activation_bytes=activation_budget_bytes or min(4 << 30, available_ram_bytes() // 4),
        dtype=None if dtype is None else getattr(torch, dtype),
        seed=seed,
        warnings=warnings,
        fingerprint=after.fingerprint,
        whole=after.recipe,
        stages=after.stages,
        stage_ledgers=after.stage_ledgers,
        end_steps=tuple(catalog.build_step(step.method, step.options) for step in END_STEPS),
    )
    facts = (
        _format_note(refusal, grids), _shortcuts_note(model), sparsity_note(grids),
        factors_note(grids, shapes), kernels_note(place, steps),
    )  # fmt: skip
    job = replace(job, warnings=(*job.warnings, *(fact for fact in facts if fact is not None)))
    quiet = job.needs_data or after.stages
    if not quiet and (calibration != "builtin" or samples is not None):
        unused = "no step needs calibration: --calibration and --samples change nothing."
        job = replace(job, warnings=(*job.warnings, unused))
    settled = earlier_samples(output, job.work_dir) if resume else None
    count = samples or settled or SAMPLES
    predicted = make_plan(model, job, grids, count, seq_len)
    notes: tuple[str, ...] = ()
    if samples is None and job.needs_data and model.device.type == "cpu":
        while settled is None and predicted.seconds > CPU_SECONDS and count > MIN_SAMPLES:
            half = make_plan(model, job, grids, count // 2, seq_len)
            if half.seconds > WORTH_HALVING * predicted.seconds:  # iterations take the time
                break
            count, predicted = count // 2, half
        if count < SAMPLES:  # the same words in every attempt: they are in the ledger
            notes = (
                f"{count} samples instead of {SAMPLES}: more would take over {CPU_SECONDS // 60} "
                "minutes on this CPU, or the first attempt at this output was given as many. "
                f"--samples {SAMPLES} takes them all.",
            )
    windows = None
    if job.needs_data and not (only_plan and calibration == OWN_TEXT):
        windows = calibration_windows(
            model, source, calibration, count, seq_len, seed, EventLog(None, on_event),
            trust_remote_code=trust_remote_code, revision=revision,
        )  # fmt: skip
        windows = replace(windows, notes=(*windows.notes, *notes))
        if windows.tokens_NT.shape[0] != count:
            predicted = make_plan(model, job, grids, *windows.tokens_NT.shape)
        predicted = predicted.model_copy(update={"text": windows.health})
    said = [*job.warnings, *(() if windows is None else windows.notes)]
    if windows is not None and not only_plan:
        log, refused = EventLog(None, on_event), refusal is not None
        settled_job, grids = _settled(model, job, grids, windows, refused, log)
        if settled_job is not job:
            job = settled_job
            plan = make_plan(model, job, grids, *windows.tokens_NT.shape)
            predicted = plan.model_copy(update={"text": windows.health})
    if job.needs_data and windows is None:
        said.append("the model writes its calibration text first, which takes time not counted.")
    predicted = predicted.model_copy(update={"warnings": said, "proof": proof})
    return Prepared(model, job, grids, windows, predicted)


def _proof(model: Model, grids: Grids, target: str) -> str | None:
    """What runs of the target engine say, before compute is spent.

    Raises:
        UnsupportedLayer: If it refused such files.
    """
    form, names = grids.format_name, grid_names(grids.quantized, grids.inputs)
    if grids.factoring:
        names = ("factors",)
    elif grids.compact:
        names = ("sparse",)
    elif target == "llama.cpp":
        shapes = model.linear_shapes()
        held = {holding_type(spec, shapes[n][1]) for n, spec in grids.quantized.items()}
        form, names = "gguf", tuple(sorted(kind or "floats" for kind in held))
    found = judge(target, form, names, str(model.config.get("model_type")))
    return None if found is None else found.text


def _format_note(refusal: str | None, grids: Grids) -> str | None:
    if refusal is None or grids.format_name != "pocketlm" or not grids.quantized:
        return None
    return (
        f"{refusal}: written in the format pocketlm, which pocketlm.load runs and transformers "
        "loads after `import pocketlm.hf`."
    )


def _shortcuts_note(model: Model) -> str | None:
    count = len(model.shortcuts)
    return shortcuts_note(count, hidden_width(model)) if count else None


def _settled(
    model: Model, job: Job, grids: Grids, windows: Windows, refused: bool, log: EventLog
) -> tuple[Job, Grids]:
    """The job with the shares of zeros that its pruning steps' allocations give each linear."""
    steps, recipe = list(job.steps), job.recipe
    specs = list(recipe.steps)
    for place, step in enumerate(job.steps):
        pruning = pruning_step([step])
        if pruning is None or pruning.survey is None:
            continue
        found = shares(
            model, job, list(grids.specs), windows, pruning.survey, pruning.sparsity.zeros, log
        )
        overrides = {name: f"{share:.4f}" for name, share in found.items()}
        options = {**specs[place].options, "allocation": "uniform", "overrides": overrides}
        specs[place] = StepSpec(method=specs[place].method, options=options)
        steps[place] = catalog.build_step(specs[place].method, options)
    if specs == list(recipe.steps):
        return job, grids
    recipe = recipe.model_copy(update={"steps": tuple(specs)})
    shapes = model.linear_shapes()
    grids = choose_grids(shapes, refused, recipe, job.target, steps, model.ends(), model.shortcuts)
    return replace(job, recipe=recipe, steps=tuple(steps)), grids


def name_of(source: str | Path | PreTrainedModel) -> str:
    """A source in words."""
    return os.fspath(source) if isinstance(source, str | Path) else type(source).__name__
