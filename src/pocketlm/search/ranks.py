"""Ranks by budget: what `allocation` of a factorising step asks for, measured and made a recipe.

energy        each direction by its share of the linear's output (`lowrank.allocate`);
sensitivity   that times KL / error of the linear: near the original the divergence is quadratic in
              the output error, so that one figure serves for all ranks. It is measured as for grids
              (`search.measure`), with 3-bit integers as the change. It stands for ASVD's search
              (arXiv:2312.05821, section 3.3), which runs the model for every linear and ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocketlm import catalog
from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows, token_windows
from pocketlm.core.spec import QuantSpec, Recipe, StepSpec, matches
from pocketlm.core.views import ModelView
from pocketlm.engine.events import EventLog, Listener
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.machine import cache_directory, choose_device
from pocketlm.lowrank.allocate import Spectrum, allocate_ranks
from pocketlm.lowrank.rank import Ranked
from pocketlm.models import open_model
from pocketlm.search.measure import Measurer
from pocketlm.search.quick import STEPS, context
from pocketlm.search.source import SEQ_LEN, WINDOWS
from pocketlm.search.spectra import measure_spectra
from pocketlm.search.store import Store
from pocketlm.search.table import filled
from pocketlm.search.units import choice_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECTRA_WINDOWS = 64  # the Hessian of a wide linear needs many more tokens than a KL
PROBE = QuantSpec(bits=3, group_size=64)  # the change whose KL tells how much an error costs
DAMPING = 1e-4
UNIFORM = "uniform"


def wants_ranks(recipe: Recipe) -> bool:
    """Whether a step of a recipe asks for ranks that have to be measured."""
    steps = (catalog.build_step(spec.method, spec.options) for spec in recipe.steps)
    return any(isinstance(step, Ranked) and step.allocation != UNIFORM for step in steps)


@dataclass(frozen=True)
class Text:
    """What ranks are measured on.

    Attributes:
        spectra: Windows for the directions' energies.
        divergence: One batch, for KL.
    """

    spectra: Windows
    divergence: Windows


def ranked_recipe(
    model: ModelView,
    text: Text,
    recipe: Recipe,
    root: Path,
    limit_seconds: float,
    listener: Listener | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe with every rank named.

    Args:
        model: The original; best in float32.
        text: What is measured on.
        recipe: With one or more steps that share out a ratio.
        root: Where findings on KL are kept.
        limit_seconds: What measuring KL may take.
        listener: Called with each event.

    Returns:
        An ordinary recipe, and what is to be told.

    Raises:
        BudgetError: If the ratio leaves less than a rank of 1 to each linear.
        ConfigError: If a step or option is unknown.
        NumericError: If a Hessian stays singular, or logits are not finite.
    """
    log, notes = EventLog(None, listener), list[str]()
    steps: list[StepSpec] = []
    for spec in recipe.steps:
        step = catalog.build_step(spec.method, spec.options)
        if not isinstance(step, Ranked) or step.allocation == UNIFORM or not step.share_removed:
            steps.append(spec)
            continue
        names = [
            name
            for name in model.linear_shapes()
            if not recipe.ignores(name)
            and any(matches(pattern, name) for pattern in step.modules)
            and not any(matches(pattern, name) for pattern in step.ranks)
        ]
        log.emit("stage", f"spectra of {len(names)} linears", data={"stage": "search"})
        spectra = measure_spectra(model, text.spectra.tokens_NT, names, DAMPING)
        if step.allocation == "sensitivity":
            weights, said = _weights(model, text.divergence, recipe, root, limit_seconds, log)
            spectra = {
                name: Spectrum(s.shape, s.energy_R, weights[name]) for name, s in spectra.items()
            }
            notes += said
        ranks = allocate_ranks(spectra, step.share_removed, step.multiple_of)
        options = {k: v for k, v in spec.options.items() if k not in ("ratio", "allocation")}
        options["ranks"] = {**ranks, **step.ranks}
        steps.append(StepSpec(method=spec.method, options=options))
    return recipe.model_copy(update={"steps": tuple(steps)}), notes


def _weights(
    model: ModelView,
    windows: Windows,
    recipe: Recipe,
    root: Path,
    limit_seconds: float,
    log: EventLog,
) -> tuple[Mapping[str, float], list[str]]:
    """KL / relative error of every linear."""
    probe = Recipe(steps=STEPS, weights=PROBE, ignore=recipe.ignore)
    shapes, ends = model.linear_shapes(), model.ends()
    refused = model.packing_refusal("transformers") is not None
    grids = choose_grids(shapes, refused, probe, "transformers", ends=ends)
    units = choice_units(model, probe, grids, (PROBE,), "transformers")
    measurer = Measurer(model, windows, Store(root, context(model, windows)), log)
    errors = measurer.errors(units)
    damages = filled(errors, measurer.damages(units, errors, limit_seconds))
    weights: dict[str, float] = {}
    for unit, error, damage in zip(units, errors, damages, strict=True):
        for name in unit.linears:
            weights[name] = max(damage[0], 0.0) / max(error[0], 1e-12)
    typical = torch.tensor(list(weights.values())).median().item() if weights else 1.0
    return {name: weights.get(name, typical) for name in model.linear_shapes()}, measurer.notes


def ranks_of_source(
    source: str | Path | PreTrainedModel,
    recipe: Recipe,
    *,
    search_minutes: float,
    search_dir: str | Path | None,
    listener: Listener | None,
    calibration: str = "builtin",
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with every rank named, from what a user names.

    Args:
        source: What `open_model` takes.
        recipe: With a step that has an `allocation`.
        search_minutes: What measuring KL may take.
        search_dir: Where findings are kept; None: the user's cache.
        listener: Called with each event.
        calibration: What `load_text` takes; ``self`` is measured on the builtin text.
        seed: Of the windows.
        device: Where blocks compute.
        threads: CPU threads.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Returns:
        The recipe, and what is to be told.
    """
    if not wants_ranks(recipe):
        return recipe, ()
    if threads is not None:
        torch.set_num_threads(threads)
    model = open_model(
        source, device=choose_device(device), compute_dtype=torch.float32,
        trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    tokenizer = model.tokenizer()
    own = calibration == "self"
    text = load_text("builtin" if own else calibration, "calibration", tokenizer)
    length = min(SEQ_LEN, model.context)

    def windows(count: int) -> Windows:
        return token_windows(tokenizer, text, count, length, seed, model.context)

    measured_on = Text(windows(SPECTRA_WINDOWS), windows(WINDOWS))
    root = Path(search_dir) if search_dir else cache_directory("search")
    found, notes = ranked_recipe(model, measured_on, recipe, root, 60.0 * search_minutes, listener)
    said = ["ranks were measured on the builtin text."] if own else []
    return found, (*said, *notes)
