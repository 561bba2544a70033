"""What a run and its evaluations measured becomes the artifact's metrics, page and card."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path

import yaml

import pocketlm
from pocketlm.core.spec import Recipe
from pocketlm.core.views import ModelView, TensorInfo
from pocketlm.engine.grids import grid_text, inputs_text
from pocketlm.engine.ledger import Ledger
from pocketlm.engine.plan import Plan
from pocketlm.evaluate.hardware import device_name
from pocketlm.formats.shards import write_file
from pocketlm.report.card import carried_front_matter, licence_text, model_card
from pocketlm.report.data import (
    FOLDER,
    Prediction,
    ReportData,
    StageResult,
    Timing,
    read_metrics,
    write_metrics,
)
from pocketlm.report.html import write_report
from pocketlm.report.ledger import (
    input_rows,
    ledger_remarks,
    ledger_rows,
    linear_results,
    size_parts,
)
from pocketlm.report.loading import loadings
from pocketlm.report.words import percent_text

LEDGER = "ledger.json"


def read_ledger(artifact: Path) -> Ledger:
    """The artifact's ledger."""
    return Ledger.model_validate_json((artifact / FOLDER / LEDGER).read_text("utf-8"))


def write_run_report(
    artifact: Path,
    source: ModelView,
    written: Mapping[str, TensorInfo],
    plan: Plan,
    seconds: dict[str, float],
    peak_ram_bytes: int | None,
    stages: tuple[StageResult, ...] = (),
) -> Path:
    """Writes metrics, page and card of a finished run, before any evaluation.

    Args:
        artifact: Its directory.
        source: The original.
        written: The artifact's tensors.
        plan: What was predicted.
        seconds: Of the stages.
        peak_ram_bytes: Of the process.
        stages: What each stage left, where the recipe has stages.

    Returns:
        The page.
    """
    ledger = read_ledger(artifact)
    recipe_yaml = (artifact / FOLDER / "recipe.yaml").read_text("utf-8")
    infos = source.source.infos()
    parameters = sum(math.prod(info.shape) for info in infos.values())
    original_bytes = sum(info.bytes_stored for info in infos.values())
    output_bytes = sum(info.bytes_stored for info in written.values())
    total = sum(seconds.values())
    data = ReportData(
        title=artifact.name,
        source=ledger.source,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=pocketlm.__version__,
        machine=f"{device_name(source.device)}; {platform.platform()}",
        scheme=scheme_text(ledger),
        methods=tuple(step.method for step in recipe_of(artifact).steps),
        calibration=(
            ledger.calibration.sentence() if ledger.calibration else "none: no step needs data"
        ),
        recipe_yaml=recipe_yaml,
        parameters=parameters,
        original_bytes=original_bytes,
        compressed_bytes=output_bytes,
        original_bits=original_bytes * 8 / parameters,
        linear_bits=ledger.bits_per_weight(),
        sizes=size_parts(infos, written, ledger, source.block_paths),
        linears=linear_results(ledger),
        timings=tuple(Timing(stage=name, seconds=value) for name, value in seconds.items()),
        predictions=(
            Prediction(
                name="output", unit="bytes", predicted=plan.output_bytes, actual=output_bytes
            ),
            Prediction(
                name="peak RAM", unit="bytes", predicted=plan.peak_ram_bytes, actual=peak_ram_bytes
            ),
            Prediction(name="time", unit="seconds", predicted=plan.seconds, actual=total or None),
        ),
        remarks=ledger_remarks(ledger),
        ledger=ledger_rows(ledger),
        text=None if ledger.calibration is None else ledger.calibration.health,
        inputs=input_rows(ledger),
        stages=stages,
    )
    return write_all(artifact, data)


def recipe_of(artifact: Path) -> Recipe:
    """The resolved recipe that the artifact carries."""
    path = artifact / FOLDER / "recipe.yaml"
    return Recipe.parse(yaml.safe_load(path.read_text("utf-8")), where=str(path))


def scheme_text(ledger: Ledger) -> str:
    """The number formats in words, such as ``4 bits, symmetric, groups of 64``."""
    entries = ledger.tensors.values()
    grids = dict.fromkeys(grid_text(entry.spec) for entry in entries if entry.spec is not None)
    pruned = [e.sparsity for e in entries if e.sparsity is not None]
    shares = [] if not pruned else [f"{percent_text(sum(pruned) / len(pruned))} pruned"]
    inputs = dict.fromkeys(e.activations for e in entries if e.activations is not None)
    smaller = [stage.summary for stage in ledger.stages]
    return "; ".join([*smaller, *grids, *shares, *map(inputs_text, inputs)])


def write_all(artifact: Path, data: ReportData) -> Path:
    """Writes metrics.json, report.html and the model card.

    Returns:
        The page.
    """
    write_metrics(artifact, data)
    config = json.loads((artifact / "config.json").read_text("utf-8"))
    card = artifact / "README.md"  # the source's own at first: its front matter is carried over
    carried = carried_front_matter(card.read_text("utf-8") if card.exists() else "")
    text = model_card(config, read_ledger(artifact), recipe_of(artifact), data, carried=carried)
    write_file(card, text.encode())
    ways = loadings(config, read_ledger(artifact), data.title)
    return write_report(artifact, data, ways, licence_text(carried))  # last: then the rest is there


def render(artifact: Path) -> Path:
    """Writes page and card anew from the artifact's metrics."""
    return write_all(artifact, read_metrics(artifact))
