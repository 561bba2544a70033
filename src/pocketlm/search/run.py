"""The whole of one search: units, errors, divergences, the table, the choice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pocketlm.calibration.record import account_of
from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.core.views import ModelView
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.grids import Grids, choose_grids, grid_text
from pocketlm.search.allocate import allocate
from pocketlm.search.budget import Budget, Spent, room, spent
from pocketlm.search.choices import Choices, findings
from pocketlm.search.ends import end_units
from pocketlm.search.measure import Measurer
from pocketlm.search.quick import context
from pocketlm.search.results import SearchResult
from pocketlm.search.rewrite import with_grids
from pocketlm.search.store import Store
from pocketlm.search.table import filled, undominated
from pocketlm.search.units import Unit, choice_units, default_candidates


@dataclass(frozen=True)
class Question:
    """What is searched for.

    Attributes:
        recipe: Its steps, group size and overrides are taken over.
        target: Engine that must load the result.
        budget: None for the frontier alone.
        candidates: Grids to choose from; None for the recipe's at 2, 3, 4, 5, 6 and 8 bits.
        dtype: Of the tensors that are kept; None: as in the source.
        limit_seconds: What measuring KL may take.
    """

    recipe: Recipe
    target: str
    budget: Budget | None
    candidates: tuple[QuantSpec, ...] | None
    dtype: torch.dtype | None
    limit_seconds: float


def run_search(
    model: ModelView,
    windows: Windows,
    question: Question,
    root: Path,
    listener: Listener | None = None,
) -> SearchResult:
    """Measures what is not known yet, and chooses.

    Args:
        model: The original; best in float32, so that rounding does not hide small damages.
        windows: One batch of text.
        question: What is searched for.
        root: Where findings are kept.
        listener: Called with each event.

    Returns:
        What was found, with the recipe where there is a budget.

    Raises:
        BudgetError: If the budget is below what is possible; before anything is measured.
        UnsupportedLayer: If the target can load none of the candidates.
        ConfigError: If the recipe leaves nothing to choose.
        NumericError: If the model's logits are not finite.
    """
    started = time.monotonic()
    log = EventLog(None, listener)
    candidates = question.candidates or default_candidates(question.recipe)
    grids = _any_grids(model, question, candidates)
    units = choice_units(model, question.recipe, grids, candidates, question.target)
    if question.budget is not None and question.budget.file_bytes is not None:
        units += end_units(
            model, question.recipe, grids, candidates, question.target, question.dtype
        )
    before = spent(model, grids, units, question.dtype)
    if question.budget is not None:
        room(question.budget, units, before)
    store = Store(root, context(model, windows))
    measurer = Measurer(model, windows, store, log)
    errors = measurer.errors(units)
    kept = [undominated(unit, row) for unit, row in zip(units, errors, strict=True)]
    errors = [[row[c] for c in some] for row, some in zip(errors, kept, strict=True)]
    units = [
        replace(unit, candidates=tuple(unit.candidates[c] for c in some))
        for unit, some in zip(units, kept, strict=True)
    ]
    measured = measurer.damages(units, errors, question.limit_seconds)
    damages = filled(errors, measured)
    choices = Choices(grids, units, damages, before)
    chosen = None
    if question.budget is not None:
        chosen = allocate(damages, *room(question.budget, units, before))
    notes = [
        *windows.notes,
        *measurer.notes,
        *_kept(question.budget, before, units),
        *_compressed_ends(units, chosen),
    ]
    for note in notes:
        log.emit("warning", note, where="search")
    return SearchResult(
        recipe=None if chosen is None else _recipe(model, question.recipe, grids, units, chosen),
        chosen=None if chosen is None else choices.point("allocated", chosen),
        frontier=choices.frontier(),
        uniform=choices.uniform(),
        units=findings(units, errors, damages, measured, chosen),
        notes=notes,
        calibration=account_of(windows).sentence(),
        table=str(store.directory),
        seconds=time.monotonic() - started,
    )


def _any_grids(model: ModelView, question: Question, candidates: Sequence[QuantSpec]) -> Grids:
    """What is compressed and in which format, by the first candidate that the target takes."""
    refusal: UnsupportedLayer | None = None
    for spec in candidates:
        recipe = question.recipe.model_copy(update={"weights": spec})
        try:
            return choose_grids(
                model.linear_shapes(),
                model.packing_refusal(question.target) is not None,
                recipe,
                question.target,
                ends=model.ends(),
                shortcuts=model.shortcuts,
            )
        except UnsupportedLayer as error:
            refusal = error
    assert refusal is not None
    raise refusal


def _kept(budget: Budget | None, before: Spent, units: Sequence[Unit]) -> list[str]:
    """What a budget in bytes goes to before any choice: said, since it is much of a small model."""
    free = any(unit.end is not None and unit.end.embeds for unit in units)
    if budget is None or budget.file_bytes is None or free:
        return []
    share = before.kept_bytes / budget.file_bytes
    return [
        f"{before.kept_bytes:,} bytes of the budget ({100 * share:.0f} %) are tensors that keep "
        "their precision, the embedding above all: it is ignored, or the target loads no "
        "compressed one."
    ]


def _compressed_ends(units: Sequence[Unit], chosen: Sequence[int] | None) -> list[str]:
    """Which of embedding and head the choice compresses, and what that asks of who loads it."""
    said: list[str] = []
    for unit, c in zip(units, chosen or [], strict=False):
        spec = unit.candidates[c].specs.get(unit.name)
        if unit.end is None or spec is None:
            continue
        tied = " (the head is tied to it: stored once)" if unit.end.tied_name else ""
        loads = (
            f" transformers loads it after `import pocketlm.hf`; --ignore {unit.name} keeps it as "
            "it is, for transformers alone."
        )
        text = f"{unit.name}{tied} is compressed: {grid_text(spec)}."
        said.append(text + (loads if unit.end.embeds else ""))
    return said


def _recipe(
    model: ModelView, recipe: Recipe, grids: Grids, units: Sequence[Unit], chosen: Sequence[int]
) -> Recipe:
    asked = {
        name: spec
        for unit, c in zip(units, chosen, strict=True)
        for name in unit.linears
        if (spec := unit.candidates[c].spec) is not None
    }
    wanted: dict[str, QuantSpec] = {}
    for name in grids.quantized:
        spec = asked.get(name) or recipe.spec_for(name)
        assert spec is not None
        wanted[name] = spec
    rewritten = with_grids(recipe, wanted, model.linear_shapes(), model.block_paths)
    ends = [name for end in model.ends() for name in (end.name, end.tied_name) if name]
    named = {name: spec for name in ends if (spec := asked.get(name) or recipe.spec_for_end(name))}
    return rewritten.model_copy(update={"overrides": {**rewritten.overrides, **named}})
