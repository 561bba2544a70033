"""The model card of an artifact: README.md with the front matter that model hubs read.

It says what the weights are, how to load them in each engine (and which engines cannot), what was
measured and how, and what was left alone. Figures appear only where they were measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pocketlm.core.spec import ActivationSpec, Recipe
from pocketlm.core.stored import LowRankSpec
from pocketlm.engine.grids import grid_text, inputs_text
from pocketlm.engine.ledger import Ledger
from pocketlm.report.data import ReportData
from pocketlm.report.loading import grids, loadings
from pocketlm.report.verdict import verdict
from pocketlm.report.words import (
    bytes_text,
    interval_text,
    number_text,
    percent_text,
    share_text,
)

CARRIED_KEYS = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "base_model",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WARNINGS_SHOWN = 20  # the ledger has them all


def carried_front_matter(readme: str) -> dict[str, Any]:
    """Licence, language and task out of the card of the source, as they are.

    Args:
        readme: The source's README.md; may be empty.

    Returns:
        Those of `CARRIED_KEYS` that it states.
    """
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:  # a card that hubs cannot read either: nothing to carry over
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in CARRIED_KEYS if key in data}


def model_card(
    config: Mapping[str, Any],
    ledger: Ledger,
    recipe: Recipe,
    metrics: ReportData | None = None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    carried: Mapping[str, Any] | None = None,
) -> str:
    """Writes the card.

    Args:
        config: config.json of the artifact.
        ledger: Its accounts.
        recipe: What was done.
        metrics: What was measured, if anything was.
        base_model: The model it was made from: a hub id, else it is named in the text only.
        revision: Of the base model.
        carried: What `carried_front_matter` took from the source's card.

    Returns:
        The text of README.md.
    """
    base = base_model or ledger.source
    sections = [
        _front_matter(ledger, base, carried or {}),
        f"# {_title(base)}, {_scheme(ledger)}",
        *_verdict(metrics),
        _summary(ledger, base, revision),
        "## Load it\n\n" + _loading(config, ledger),
        "## Size\n\n" + _sizes(ledger, metrics),
        "## Quality\n\n" + _quality(metrics),
        "## How it was made\n\n" + _making(ledger, recipe, metrics),
        "## What was left as it was\n\n" + _kept(ledger),
        "## Licence\n\n" + licence_text(carried or {}),
    ]
    return "\n\n".join(sections) + "\n"


def _verdict(metrics: ReportData | None) -> list[str]:
    """What the page says first too; nothing where no quality was measured."""
    if metrics is None or metrics.quality is None:
        return []
    found = verdict(metrics)
    return [f"**{found.word}.** {' '.join(found.reasons)}"]


def _front_matter(ledger: Ledger, base: str, carried: Mapping[str, Any]) -> str:
    data: dict[str, Any] = dict(carried)
    if HUB_ID.fullmatch(base):  # else what the source's own card says that it was made from
        data |= {"base_model": base, "base_model_relation": "quantized"}
    data["library_name"] = "pocketlm" if ledger.format == "pocketlm" else "transformers"
    data.setdefault("pipeline_tag", "text-generation")
    bits = sorted({f"{spec.bits}-bit" for spec in grids(ledger).values()})
    made = sorted({entry.action for entry in ledger.compressed().values()} - {"kept"})
    data["tags"] = ["pocketlm", ledger.format, *made, *bits]
    text = yaml.safe_dump(data, sort_keys=True, allow_unicode=True)
    return f"---\n{text}---"


def _title(base: str) -> str:
    return base.rstrip("/").rsplit("/", 1)[-1]


def _sparsity(ledger: Ledger) -> str | None:
    """The share of the compressed linears' weights that was pruned, in words; None: none was."""
    pruned = [e for e in ledger.compressed().values() if e.sparsity is not None]
    if not pruned:
        return None
    zeros = sum((e.sparsity or 0.0) * math.prod(e.shape) for e in pruned)
    return percent_text(zeros / sum(math.prod(e.shape) for e in pruned))


def _factorised(ledger: Ledger) -> str | None:
    """The share of the parameters that factors left of the linears they replace, in words."""
    left = weights = 0
    for entry in ledger.compressed().values():
        if isinstance(entry.spec, LowRankSpec):
            left += entry.spec.rank * sum(entry.shape)
            weights += math.prod(entry.shape)
    return None if not weights else f"{percent_text(left / weights)} of the parameters"


def _scheme(ledger: Ledger) -> str:
    inputs = _inputs(ledger)
    width = 16 if inputs is None else inputs.bits
    names = {
        f"W{spec.bits}A{width}" if spec.type == "int" else spec.name
        for spec in grids(ledger).values()
    }
    pruned, left, share = _sparsity(ledger), _factorised(ledger), _smaller(ledger)
    listed = "/".join(sorted(names)) or ("" if pruned or left or share else "not quantized")
    if share is not None:
        listed = f"{share} of the weights {listed}".strip()
    if pruned is not None:
        listed = f"{listed} {pruned} pruned".strip()
    if left is not None:
        listed = f"{listed} factors of {left}".strip()
    return f"{listed}, FP8 inputs" if inputs is not None and inputs.type == "float" else listed


def _smaller(ledger: Ledger) -> str | None:
    """The share of the original's weights that stages have left, in words; None without any."""
    if not ledger.stages:
        return None
    first, last = ledger.stages[0], ledger.stages[-1]
    return percent_text(last.parameters_after / first.parameters_before)


def _stages(ledger: Ledger) -> str:
    """What each stage removed, as a sentence."""
    told = "; ".join(f"{stage.method} ({stage.summary})" for stage in ledger.stages)
    first, last = ledger.stages[0], ledger.stages[-1]
    return (
        f"made smaller by pocketlm, without training: {told}; "
        f"**{last.parameters_after:,} of {first.parameters_before:,} weights** are left."
    )


def _inputs(ledger: Ledger) -> ActivationSpec | None:
    """How the linears' inputs are rounded, of those whose are; all alike."""
    found = (entry.activations for entry in ledger.tensors.values())
    return next((spec for spec in found if spec is not None), None)


def _summary(ledger: Ledger, base: str, revision: str | None) -> str:
    ends = {name: e for name, e in ledger.compressed().items() if e.end is not None}
    linears = (e for e in ledger.compressed().values() if e.end is None)
    forms = Counter(grid_text(entry.spec) for entry in linears)
    listed = "; ".join(
        (
            *(f"{count} linears: {text}" for text, count in forms.most_common()),
            *(f"`{n.removesuffix('.weight')}`: {grid_text(e.spec)}" for n, e in ends.items()),
        )
    )
    pruned = _sparsity(ledger)
    made = "quantized" if grids(ledger) else "compressed"
    made = (
        made
        if pruned is None
        else f"pruned ({pruned} zeros)" + (" and " + made) * bool(grids(ledger))
    )
    at = f", revision `{revision}`" if revision else ""
    inputs = _inputs(ledger)
    rounded = "" if inputs is None else f" Engines round the {inputs_text(inputs)}."
    smaller = f"`{base}`{at}, {_stages(ledger)}" if ledger.stages else ""
    if smaller and not ledger.compressed():
        return smaller
    subject = f"{smaller} Then its" if smaller else f"`{base}`{at}, its"
    what = "weight of a compressed linear" if ends else "compressed weight"
    return (
        f"{subject} weights {made} by pocketlm ({listed}): "
        f"**{ledger.bits_per_weight():.3f} bits per {what}**, all included.{rounded}"
    )


def _loading(config: Mapping[str, Any], ledger: Ledger) -> str:
    parts = []
    for way in loadings(config, ledger):
        parts.append(f"**{way.engine}**: {way.note}")
        if way.code:
            parts.append(f"```{way.language}\n{way.code}\n```")
    return "\n\n".join(parts)


def _sizes(ledger: Ledger, metrics: ReportData | None) -> str:
    entries = ledger.tensors.values()
    stored = sum(entry.bits for entry in entries) / 8
    rows = []
    ends = [entry for entry in entries if entry.end is not None]
    others = [entry for entry in entries if entry.end is None and entry.action != "dropped"]
    for part, chosen in (
        ("compressed linears", [e for e in others if e.spec is not None]),
        *([("compressed embedding and head", ends)] if ends else []),
        ("everything else", [e for e in others if e.spec is None]),
    ):
        weights, bits = sum(math.prod(e.shape) for e in chosen), sum(e.bits for e in chosen)
        if ledger.stages and not ledger.compressed() and chosen:
            weights = ledger.stages[-1].parameters_after  # shapes are the source's
        per_weight = f"{bits / weights:.3f}" if weights else "–"
        rows.append((part, f"{weights:,}", bytes_text(bits / 8), per_weight))
    table = _table(("part", "weights", "bytes", "bits per weight"), rows)
    total = f"{bytes_text(stored)} of weights"
    if metrics is not None:
        total = (
            f"{bytes_text(metrics.compressed_bytes)} on disk, "
            f"{bytes_text(metrics.original_bytes)} before"
        )
    return f"{total}.\n\n{table}"


def _quality(metrics: ReportData | None) -> str:
    if metrics is None or metrics.quality is None:
        return "Not measured. `pocketlm eval PATH --against BASE` measures it."
    quality = metrics.quality
    rows = [("perplexity", number_text(quality.perplexity, 5))]
    found = quality.divergence
    if found is not None:
        loss = found.loss_over_original
        rows = [
            ("perplexity of the original", number_text(found.original_perplexity, 5)),
            ("perplexity", number_text(quality.perplexity, 5)),
            (
                "log-perplexity over the original",
                f"{number_text(loss.value)} ({interval_text(loss)})",
            ),
            (
                "KL from the original, mean",
                f"{number_text(found.kl_mean.value)} ({interval_text(found.kl_mean)})",
            ),
            ("KL, 99th percentile", number_text(found.kl_p99.value)),
            ("same likeliest token", percent_text(found.top1_agreement.value)),
        ]
    parts = [_table(("", "value (95 % interval)"), rows), quality.protocol.sentence()]
    parts += [f"Note: {note}" for note in quality.notes]
    if metrics.tasks:
        scores = [
            (result.task, f"{percent_text(result.score.value)} ({share_text(result.score)})")
            for result in metrics.tasks
        ]
        parts.append(_table(("task", "score (95 % interval)"), scores))
        parts += [result.sentence() for result in metrics.tasks]
    if metrics.speed is not None:
        speed = metrics.speed
        parts.append(
            f"Prefill {number_text(speed.prefill_tokens_per_second)} and decode "
            f"{number_text(speed.decode_tokens_per_second)} tokens/s. {speed.sentence()}"
        )
    return "\n\n".join(parts)


def _making(ledger: Ledger, recipe: Recipe, metrics: ReportData | None) -> str:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    parts = [f"```yaml\n{text}```"]
    if metrics is not None:
        parts.append(f"Calibration: {metrics.calibration}")
        if metrics.command:
            parts.append(f"```sh\n{metrics.command}\n```")
    if ledger.warnings:
        shown = [f"- {warning}" for warning in ledger.warnings[:WARNINGS_SHOWN]]
        more = len(ledger.warnings) - len(shown)
        if more:
            shown.append(f"- … and {more} more in `pocketlm/ledger.json`")
        parts.append("Warnings of the run:\n\n" + "\n".join(shown))
    return "\n\n".join(parts)


def _kept(ledger: Ledger) -> str:
    reasons: dict[str, list[str]] = {}
    for name, entry in ledger.tensors.items():
        if entry.spec is None:
            reasons.setdefault(f"{entry.action}: {entry.reason}", []).append(name)
    if not reasons:
        return "Nothing."
    return "\n".join(
        f"- {reason}: {len(names)} tensors, such as `{names[0]}`"
        for reason, names in reasons.items()
    )


def licence_text(carried: Mapping[str, Any]) -> str:
    """The licence as a sentence, from what `carried_front_matter` found."""
    licence = carried.get("license")
    if not licence:
        return "That of the base model, whose card does not state it in a form that could be read."
    name = carried.get("license_name", licence)
    link = carried.get("license_link")
    return f"That of the base model: {name}{f' ({link})' if link else ''}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
