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

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.outcome import CompressResult, result_of, write_report
from pocketlm.recipes import build_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocketlm.engine.events import Listener
    from pocketlm.engine.ledger import Ledger
    from pocketlm.engine.plan import Plan
    from pocketlm.prepare import Prepared
    from pocketlm.search.budget import Budget
    from pocketlm.search.results import SearchResult
    from pocketlm.stages import Reduced

SEARCH_MINUTES = 30.0
SHARED = (  # options of `compress` that `search` has too
    "target", "calibration", "seed", "device", "dtype", "threads", "trust_remote_code", "revision",
)  # fmt: skip
RecipeLike = str | Path | dict[str, Any] | Recipe


def plan_model(
    source: str | Path | PreTrainedModel, recipe: RecipeLike = "w4a16", **options: Any
) -> Plan:
    """Predicts a compression; see `pocketlm.api.plan`."""
    wanted = build_recipe(recipe, ignore=tuple(options.pop("ignore", ())))
    if (staged := _in_stages(wanted)) is not None:
        return _plan_stages(source, staged, **options)
    return _prepare(source, wanted, Path("out"), resume=False, only_plan=True, **options).plan


def search(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike = "w4a16",
    *,
    bits: float | None = None,
    size: int | None = None,
    candidates: Sequence[QuantSpec] | None = None,
    ignore: tuple[str, ...] = (),
    target: str = "transformers",
    calibration: str = "builtin",
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    search_minutes: float = SEARCH_MINUTES,
    search_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_event: Listener | None = None,
) -> SearchResult:
    """Finds where bits matter: the best grid for each layer within a budget, and the frontier.

    Args:
        source: As for `compress`.
        recipe: Gives the steps, the group size and symmetry, and overrides, which are kept.
        bits: Budget: average real bits of the compressed linears, a float (3.5, 4.0).
        size: Budget: bytes of the weight files. Without either, the frontier alone.
        candidates: Grids to choose from; None for the recipe's at 2, 3, 4, 5, 6 and 8 bits.
        ignore: Further patterns of linears to keep.
        target: Engine that must load the result.
        calibration: The text that damage is measured on, as for `compress`.
        seed: Of its windows.
        device: Where to run.
        dtype: Of the tensors that are kept.
        threads: CPU threads.
        search_minutes: What measuring may take beyond one KL a unit, which is always measured.
        search_dir: Where findings are kept for every later budget; None: the user's cache.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        on_event: Called with each event.

    Returns:
        The sensitivity table, the frontier and, with a budget, an ordinary recipe.

    Raises:
        BudgetError: If the budget is below what is possible; says the smallest that is.
        PocketLMError: If something cannot be read or measured.
    """
    import torch

    from pocketlm.engine.machine import choose_device
    from pocketlm.formats.capabilities import target_name
    from pocketlm.search.run import Question
    from pocketlm.search.source import search_source

    if threads is not None:
        torch.set_num_threads(threads)
    question = Question(
        recipe=build_recipe(recipe, ignore=tuple(ignore)),
        target=target_name(target),
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
    if (staged := _in_stages(wanted)) is not None:
        return _compress_in_stages(
            source, staged, output, resume=resume, on_event=on_event, **options
        )
    return _compress_once(source, wanted, output, resume=resume, on_event=on_event, **options)


def _in_stages(recipe: Recipe) -> Recipe | None:
    """A recipe that makes a smaller model first; without a number format if it does nothing else.

    None for any other recipe.
    """
    from pocketlm.stages import has_transforms, split

    if not has_transforms(recipe):
        return None
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
        return result_of(output, reduced, plan, {}, already_done=True)
    try:
        if reduced.rest is None:
            ledger = _ledger_of(output)
            seconds = {"stages": time.monotonic() - started}
            plan = stages.joined(reduced.plans)
            result = result_of(output, ledger, plan, seconds, already_done=False)
            write_report(result, reduced.original, reduced)
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
    result = result_of(output, ledger, plan, seconds, already_done=outcome is None)
    if outcome is not None or not result.report.exists():
        write_report(result, prepared.model if reduced is None else reduced.original, reduced)
    return result


def _ledger_of(output: Path) -> Ledger:
    from pocketlm.engine.compress import finished_ledger

    ledger = finished_ledger(output)
    assert ledger is not None
    return ledger


def _prepare(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
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

    notes: tuple[str, ...] = ()
    started = time.monotonic()
    shared = {name: options[name] for name in SHARED if name in options}
    if any("allocation" in step.options for step in recipe.steps):
        from pocketlm.search.ranks import ranks_of_source

        measuring = {k: v for k, v in shared.items() if k not in ("target", "dtype")}
        recipe, notes = ranks_of_source(
            source, recipe, search_minutes=search_minutes, search_dir=search_dir,
            listener=on_event, **measuring,
        )  # fmt: skip
    if bits is not None or size is not None:
        found = search(
            source, recipe, bits=bits, size=size, candidates=candidates,
            search_minutes=search_minutes, search_dir=search_dir, on_event=on_event, **shared,
        )  # fmt: skip
        assert found.recipe is not None
        recipe, notes = found.recipe, (*notes, *found.notes)
    prepared = prepare(
        source, recipe, output, resume=resume, warnings=notes, on_event=on_event, **options
    )
    return replace(prepared, seconds=time.monotonic() - started)
