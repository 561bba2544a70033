"""What users and the CLI call. Heavy imports happen inside the calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.recipes import build_recipe, read_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pocketlm.engine.events import Listener
    from pocketlm.engine.export import Export
    from pocketlm.engine.ledger import Ledger
    from pocketlm.engine.plan import Plan
    from pocketlm.evaluate.verify import VerifyReport
    from pocketlm.models.adapter import Model
    from pocketlm.models.inspect import Inspection
    from pocketlm.prepare import Prepared
    from pocketlm.report.data import StageResult
    from pocketlm.report.measure import Measurement
    from pocketlm.search.budget import Budget
    from pocketlm.search.results import SearchResult
    from pocketlm.stages import Reduced

__all__ = [
    "CompressResult", "build_recipe", "compare", "compress", "evaluate", "generate", "inspect",
    "load", "plan", "read_recipe", "report", "search", "verify",
]  # fmt: skip

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


def inspect(
    source: str | Path | PreTrainedModel,
    *,
    probe: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Inspection:
    """Looks at a model without compressing it: blocks, groups, folds, parameters, bytes.

    Args:
        source: A directory, hub id, `.gguf` file, `smollm2-135m`, or a model in memory.
        probe: Whether folds are proved in float64 (reads one block of each kind).
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Returns:
        What was found.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is no causal language model.
    """
    from pocketlm.models import open_model
    from pocketlm.models.inspect import inspect_model

    model = open_model(source, trust_remote_code=trust_remote_code, revision=revision)
    return inspect_model(model, probe=probe)


def plan(
    source: str | Path | PreTrainedModel, recipe: RecipeLike = "w4a16", **options: Any
) -> Plan:
    """Predicts a compression: output bytes, memory, disk and seconds.

    Args:
        source: As for `inspect`.
        recipe: A preset, a YAML file, plain data or a Recipe.
        **options: As for `compress`.

    Returns:
        The prediction.

    Raises:
        ConfigError: If the recipe cannot work.
        UnsupportedLayer: If the target cannot load a layer.
    """
    wanted = build_recipe(recipe, ignore=tuple(options.pop("ignore", ())))
    if _makes_smaller(wanted):
        return _plan_stages(source, _without_grid(wanted), **options)
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


def compress(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike = "w4a16",
    output: str | Path = "out",
    *,
    resume: bool = True,
    on_event: Listener | None = None,
    **options: Any,
) -> CompressResult:
    """Compresses a model into an ordinary Hugging Face directory; goes on by itself if stopped.

    Args:
        source: A directory, hub id, `.gguf` file, `smollm2-135m`, or a model in memory.
        recipe: A preset, a YAML file, plain data or a Recipe.
        output: Where the artifact goes.
        resume: False forgets an earlier attempt and replaces an artifact in the way.
        on_event: Called with each event.
        **options: `calibration` (builtin, self, a file, hf:org/name), `samples`, `seq_len`, `seed`,
            `ignore`, `target`, `device`, `dtype`, `threads`, `work_dir`,
            `activation_budget_bytes`, `trust_remote_code`, `revision`; a budget, `bits` (a float)
            or `size`, with `candidates`, `search_minutes` and `search_dir` as for `search`.

    Returns:
        What was made, with the prediction.

    Raises:
        PocketLMError: Any of its kinds; nothing half-written looks whole.
    """
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
        found = search(
            source, wanted, bits=bits, size=size, candidates=candidates,
            search_minutes=search_minutes, search_dir=search_dir, on_event=on_event, **shared,
        )  # fmt: skip
        assert found.recipe is not None
        wanted, notes = found.recipe, (*notes, *found.notes)
    prepared = prepare(
        source, wanted, output, resume=resume, warnings=notes, on_event=on_event, **options
    )
    return replace(prepared, seconds=time.monotonic() - started)


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    text: str | None = None,
    limit: int | None = None,
    seq_len: int = 2048,
    prompt: str | None = None,
    speed: bool = True,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> Measurement:
    """Measures a model, and its distance from the original; an artifact keeps the figures.

    Args:
        model: An artifact of pocketlm, or any source.
        against: The original.
        text: What `load_text` takes; None is the evaluation half of the builtin text.
        limit: Windows at most.
        seq_len: Tokens of a window.
        prompt: Answered greedily by both.
        speed: Whether tokens per second and memory are measured, each in a child process.
        device: Where to run.
        threads: CPU threads.
        trust_remote_code: Whether code from the checkpoint may run.
        on_event: Called with each event.

    Returns:
        What was found; for an artifact also written to its metrics, page and card.

    Raises:
        PocketLMError: If something cannot be read or measured.
    """
    return _measure(
        [model], against, text=text, limit=limit, seq_len=seq_len, prompt=prompt, speed=speed,
        device=device, threads=threads, trust_remote_code=trust_remote_code,
        on_event=on_event,
    )[0]  # fmt: skip


def compare(
    *models: str | Path, against: str | Path | None = None, **options: Any
) -> list[Measurement]:
    """Evaluates several models on the same windows; the first is the original unless named.

    The original is run once.

    Args:
        *models: Artifacts or sources, two or more.
        against: The original; None takes the first model.
        **options: As for `evaluate`.

    Returns:
        One measurement for each compared model.
    """
    original = models[0] if against is None else against
    rest = models[1:] if against is None else models
    return _measure(rest, original, **options)


def _measure(
    models: Sequence[str | Path],
    against: str | Path | None,
    *,
    device: str = "auto",
    on_event: Listener | None = None,
    **settings: Any,
) -> list[Measurement]:
    from pocketlm.engine.machine import choose_device
    from pocketlm.report.measure import Settings, measure

    chosen = Settings(device=str(choose_device(device)), **settings)
    return measure(models, against, chosen, on_event)


def verify(path: str | Path, against_source: str | Path | None = None) -> VerifyReport:
    """Reloads an artifact's written files and checks all that its ledger claims.

    Args:
        path: The artifact.
        against_source: The original, to compare tensor names with.

    Returns:
        Named checks, each passed, failed or not checked.
    """
    from pocketlm.evaluate.verify import verify_artifact

    return verify_artifact(path, against_source)


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    dtype: str | None = None,
) -> Export:
    """Writes an artifact in another form.

    Args:
        path: The artifact.
        output: Where the exported model goes.
        to: The form: "dense", an ordinary checkpoint with every weight decoded.
        dtype: Of decoded weights: bfloat16, float16 or float32; None: the artifact's.

    Returns:
        What was made: bytes and multiplications before and after.

    Raises:
        PocketLMError: If there is no such form, or the artifact cannot be read.
    """
    from pocketlm.engine.export import export as export_artifact

    return export_artifact(Path(path), Path(output).absolute(), to, dtype)


def report(path: str | Path) -> Path:
    """Renders report.html and the model card anew from an artifact's metrics.

    Returns:
        The page.
    """
    from pocketlm.report.build import render

    return render(Path(path))


def load(
    path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an artifact to run from its packed weights, or an original.

    Args:
        path: An artifact, or what `compress` takes as a source.
        device: Where to run.
        dtype: Of the activations; None lets the machine decide.

    Returns:
        A transformers model and its tokenizer.
    """
    from pocketlm.runtime.load import load as load_runtime

    return load_runtime(path, device=device, dtype=dtype)


def generate(path: str | Path, prompt: str, **options: Any) -> Any:
    """Answers one prompt.

    Args:
        path: As for `load`.
        prompt: Goes through the chat template where the tokenizer has one.
        **options: As for `pocketlm.runtime.generate.generate`.

    Returns:
        Text, tokens and timings.
    """
    from pocketlm.runtime.generate import generate as generate_text

    model, tokenizer = load(path)
    return generate_text(model, tokenizer, prompt, **options)
