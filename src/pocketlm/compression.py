"""From a recipe to an artifact: stages, search within a budget, the streamed run, the report.

What `api` promises is carried out here. A recipe with transforms runs in stages (stages.py): each
leaves a complete smaller model, and what is left of the recipe compresses the last of them. Where
there is a budget, a search first turns the recipe into one that fits. Heavy imports happen inside
the calls.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.recipes import build_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocketlm.engine.events import Listener
    from pocketlm.engine.ledger import Ledger
    from pocketlm.engine.plan import Plan
    from pocketlm.models.adapter import Model
    from pocketlm.prepare import Prepared
    from pocketlm.report.data import StageResult
    from pocketlm.search.budget import Budget
    from pocketlm.search.results import SearchResult
    from pocketlm.stages import Reduced

SEARCH_MINUTES = 30.0
SHARED = (  # options of `compress` that `search` has too
    "target", "calibration", "seed", "device", "dtype", "threads", "trust_remote_code", "revision",
)  # fmt: skip
RecipeLike = str | Path | dict[str, Any] | Recipe


class CompressResult(BaseModel):
    """What `compress` made.

    Attributes:
        output: The artifact's directory.
        report: Its report.html.
        already_done: Whether the very same artifact was there before.
        output_bytes: Of its tensors.
        bits_per_weight: Real bits of the compressed linears.
        mean_error: Mean relative output error of the linears on the calibration data.
        inputs: What calibration data reached the linears, by kind (`report.data.InputRow`).
        seconds: Of this attempt, by stage.
        peak_ram_bytes: Of this process; None where the system does not tell.
        plan: What was predicted.
        warnings: What a user must be told.
    """

    model_config = ConfigDict(extra="forbid")

    output: Path
    report: Path
    already_done: bool
    output_bytes: int
    bits_per_weight: float
    mean_error: float | None
    inputs: list[Any]
    seconds: dict[str, float]
    peak_ram_bytes: int | None
    plan: Any
    warnings: list[str]


def plan_model(
    source: str | Path | PreTrainedModel, recipe: RecipeLike = "w4a16", **options: Any
) -> Plan:
    """Predicts a compression; see `pocketlm.api.plan`."""
    wanted = build_recipe(recipe, ignore=tuple(options.pop("ignore", ())))
    if _makes_smaller(wanted):
        return _plan_stages(source, _without_grid(wanted), **options)
    return _prepare(source, wanted, Path("out"), resume=False, only_plan=True, **options).plan


def search_model(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike,
    *,
    bits: float | None,
    size: int | None,
    candidates: Sequence[QuantSpec] | None,
    search_minutes: float,
    search_dir: str | Path | None,
    on_event: Listener | None,
    ignore: tuple[str, ...] = (),
    target: str = "transformers",
    calibration: str = "builtin",
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> SearchResult:
    """Finds the best grid for each layer within a budget; see `pocketlm.api.search`."""
    import torch

    from pocketlm.engine.machine import choose_device
    from pocketlm.search.run import Question
    from pocketlm.search.source import search_source

    if threads is not None:
        torch.set_num_threads(threads)
    question = Question(
        recipe=build_recipe(recipe, ignore=tuple(ignore)),
        target=target,
        budget=_budget(bits, size),
        candidates=None if candidates is None else tuple(candidates),
        dtype=None if dtype is None else getattr(torch, dtype),
        limit_seconds=60.0 * search_minutes,
    )
    return search_source(
        source,
        question,
        calibration=calibration,
        seed=seed,
        device=str(choose_device(device)),
        directory=None if search_dir is None else Path(search_dir),
        trust_remote_code=trust_remote_code,
        revision=revision,
        listener=on_event,
    )


def _budget(bits: float | None, size: int | None) -> Budget | None:
    from pocketlm.search.budget import Budget

    if bits is None and size is None:
        return None
    if isinstance(bits, int):
        raise ConfigError(
            f"bits={bits} is no budget: a whole number is the width of every code.",
            where="bits",
            remedy=f"Give {float(bits)} for an average, or build_recipe(bits={bits}).",
        )
    return Budget(bits, size)


def compress_model(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike,
    output: str | Path,
    *,
    resume: bool,
    on_event: Listener | None,
    **options: Any,
) -> CompressResult:
    """Compresses a model; see `pocketlm.api.compress`."""
    from pocketlm.engine.compress import finished_ledger
    from pocketlm.engine.events import EventLog

    output = Path(output).absolute()
    if resume:
        finished_ledger(output)  # refuses foreign directories before any work
    EventLog(None, on_event).emit("stage", "preparing", data={"stage": "prepare"})
    wanted = build_recipe(recipe, ignore=tuple(options.pop("ignore", ())))
    if _makes_smaller(wanted):
        return _compress_in_stages(
            source, _without_grid(wanted), output, resume=resume, on_event=on_event, **options
        )
    return _compress_once(source, wanted, output, resume=resume, on_event=on_event, **options)


def _makes_smaller(recipe: Recipe) -> bool:
    from pocketlm.catalog import method_class

    return any(method_class(step.method).kind == "transform" for step in recipe.steps)


def _without_grid(recipe: Recipe) -> Recipe:
    """A recipe that makes nothing but a smaller model names no number format."""
    from pocketlm.stages import split

    return recipe if split(recipe)[1] else recipe.model_copy(update={"weights": None})


def _plan_stages(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    *,
    on_event: Listener | None = None,
    **options: Any,
) -> Plan:
    """Predicts stage after stage; the last one's plan is told with the needs of all."""
    from pocketlm import stages
    from pocketlm.prepare import After, name_of

    _no_budget(options)
    settings = stages.Settings(**options)
    model = stages.open_original(source, settings)
    name = name_of(source)
    plans, smaller = stages.plan_stages(model, name, recipe, Path("out"), settings)
    rest = stages.split(recipe)[1]
    if rest is not None:
        last = _prepare(
            source, rest, Path("out"), resume=False, only_plan=True, on_event=on_event,
            model=smaller, after=After(name), **options,
        )  # fmt: skip
        plans.append(last.plan)
    return stages.joined(plans)


def _no_budget(options: dict[str, Any]) -> None:
    """A search measures the source's blocks, which a smaller model no longer has.

    Raises:
        ConfigError: If a budget is asked for.
    """
    for name in ("bits", "size", "candidates", "search_minutes", "search_dir"):
        if options.pop(name, None) is not None and name in ("bits", "size"):
            raise ConfigError(
                "a budget cannot be searched for a model that is yet to be made smaller.",
                where=f"--{name}",
                remedy="Make the smaller model first, then compress it within the budget.",
            )


def _compress_in_stages(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
    on_event: Listener | None,
    **options: Any,
) -> CompressResult:
    """Runs a recipe's transforms one after the other, and then what is left of it."""
    from pocketlm import stages
    from pocketlm.engine.ledger import Ledger
    from pocketlm.prepare import After, name_of

    _no_budget(options)
    started = time.monotonic()
    settings = stages.Settings(**options)
    reduced = stages.reduce(
        source, recipe, output, resume=resume, on_event=on_event, settings=settings
    )
    if isinstance(reduced, Ledger):
        plan = _plan_stages(source, recipe, **options)
        return _result(output, reduced, plan, {}, already_done=True)
    try:
        if reduced.rest is None:
            ledger = _ledger_of(output)
            seconds = {"stages": time.monotonic() - started}
            plan = stages.joined(reduced.plans)
            result = _result(output, ledger, plan, seconds, already_done=False)
            _write_report(result, reduced.original, reduced)
        else:
            after = After(
                name_of(source), recipe, reduced.accounts, reduced.ledgers, reduced.fingerprint
            )
            options = {**options, "work_dir": reduced.work_dir, "revision": None}
            before = {"stages": time.monotonic() - started}
            result = _compress_once(
                reduced.path, reduced.rest, output, resume=resume, on_event=on_event,
                after=after, reduced=reduced, before=before, **options,
            )  # fmt: skip
    except BaseException:
        reduced.journal.release()
        raise
    reduced.journal.clear()
    return result


def _compress_once(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
    on_event: Listener | None,
    reduced: Reduced | None = None,
    before: dict[str, float] | None = None,
    **options: Any,
) -> CompressResult:
    """One streamed compression, perhaps after stages whose original the report compares with."""
    from pocketlm.engine.compress import run_job
    from pocketlm.engine.plan import refuse_impossible

    prepared = _prepare(source, recipe, output, resume=resume, on_event=on_event, **options)
    refuse_impossible(prepared.plan, output, prepared.model.device)
    outcome = run_job(
        prepared.model,
        prepared.job,
        prepared.grids,
        prepared.windows,
        prepared.plan,
        restart=not resume,
        listener=on_event,
    )
    seconds: dict[str, float] = {}
    if outcome is not None:
        seconds = {**(before or {}), "prepare": prepared.seconds, **outcome.seconds}
    ledger, plan = _ledger_of(output), prepared.plan
    if reduced is not None:
        from pocketlm.stages import joined

        plan = joined([*reduced.plans, plan])
    result = _result(output, ledger, plan, seconds, already_done=outcome is None)
    if outcome is not None or not result.report.exists():
        _write_report(result, prepared.model if reduced is None else reduced.original, reduced)
    return result


def _ledger_of(output: Path) -> Ledger:
    from pocketlm.engine.compress import finished_ledger

    ledger = finished_ledger(output)
    assert ledger is not None
    return ledger


def _result(
    output: Path, ledger: Ledger, plan: Plan, seconds: dict[str, float], *, already_done: bool
) -> CompressResult:
    from pocketlm.evaluate.memory import peak_memory_bytes
    from pocketlm.report.ledger import input_rows

    return CompressResult(
        output=output,
        report=output / "pocketlm" / "report.html",
        already_done=already_done,
        output_bytes=_output_bytes(ledger),
        bits_per_weight=ledger.bits_per_weight() or plan.bits_per_weight,
        mean_error=_mean_error(ledger),
        inputs=list(input_rows(ledger)),
        seconds=seconds,
        peak_ram_bytes=peak_memory_bytes(),
        plan=plan,
        warnings=ledger.warnings,
    )


def _write_report(result: CompressResult, original: Model, reduced: Reduced | None = None) -> None:
    """Writes metrics, page and card; of a recipe with stages also what each of them costs."""
    from pocketlm.models.stream import SafetensorsSource
    from pocketlm.report.build import write_run_report

    damage: tuple[StageResult, ...] = ()
    if reduced is not None:
        from pocketlm.report.waterfall import measure_stages

        names = [account.method for account in reduced.accounts]
        stages = list(zip(names, reduced.places, strict=True))
        if reduced.rest is not None:
            last = " → ".join(step.method for step in reduced.rest.steps)
            stages.append((last, result.output))
        damage = measure_stages(original, stages, trust_remote_code=reduced.trust_remote_code)
    written = dict(SafetensorsSource(result.output).infos())
    write_run_report(
        result.output,
        original,
        written,
        result.plan,
        result.seconds,
        result.peak_ram_bytes,
        damage,
    )


def _output_bytes(ledger: Ledger) -> int:
    return sum(entry.bits for entry in ledger.tensors.values()) // 8


def _mean_error(ledger: Ledger) -> float | None:
    errors = [entry.error for entry in ledger.tensors.values() if entry.error is not None]
    return sum(errors) / len(errors) if errors else None


def _prepare(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike,
    output: Path,
    *,
    resume: bool,
    ignore: tuple[str, ...] = (),
    bits: float | None = None,
    size: int | None = None,
    candidates: Sequence[QuantSpec] | None = None,
    search_minutes: float = SEARCH_MINUTES,
    search_dir: str | Path | None = None,
    on_event: Listener | None = None,
    **options: Any,
) -> Prepared:
    """A job for a recipe; where there is a budget, for the recipe that a search finds within it."""
    from pocketlm.prepare import prepare

    wanted, notes = build_recipe(recipe, ignore=tuple(ignore)), tuple[str, ...]()
    started = time.monotonic()
    if any("allocation" in step.options for step in wanted.steps):
        from pocketlm.search.ranks import ranks_of_source

        shared = {name: options[name] for name in SHARED if name in options}
        wanted, notes = ranks_of_source(
            source, wanted, search_minutes=search_minutes, search_dir=search_dir,
            listener=on_event, **shared,
        )  # fmt: skip
    if bits is not None or size is not None:
        shared = {name: options[name] for name in SHARED if name in options}
        found = search_model(
            source, wanted, bits=bits, size=size, candidates=candidates,
            search_minutes=search_minutes, search_dir=search_dir, on_event=on_event, **shared,
        )  # fmt: skip
        assert found.recipe is not None
        wanted, notes = found.recipe, (*notes, *found.notes)
    prepared = prepare(
        source, wanted, output, resume=resume, warnings=notes, on_event=on_event, **options
    )
    return replace(prepared, seconds=time.monotonic() - started)
