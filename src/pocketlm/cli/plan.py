"""Prediction before work: what a compress with the same flags would cost and give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    ActivationBudget,
    Asym,
    Bits,
    Calibration,
    Device,
    Dtype,
    GroupSize,
    Ignore,
    Json,
    Method,
    RecipeName,
    Revision,
    Samples,
    Scheme,
    SearchDir,
    SearchMinutes,
    Seed,
    SeqLen,
    Size,
    Source,
    Sparsity,
    Sym,
    Target,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text, percent_text, seconds_text

if TYPE_CHECKING:
    from pocketlm.engine.plan import Plan


def run(
    source: Source,
    recipe: RecipeName = None,
    method: Method = None,
    scheme: Scheme = None,
    bits: Bits = None,
    size: Size = None,
    group_size: GroupSize = None,
    sym: Sym = False,
    asym: Asym = False,
    sparsity: Sparsity = None,
    ignore: Ignore = None,
    target: Target = "transformers",
    calibration: Calibration = "builtin",
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    activation_budget: ActivationBudget = None,
    search_minutes: SearchMinutes = None,
    search_dir: SearchDir = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Predict bytes, memory, disk and time, and refuse what cannot work.

    Nothing of the model is run, so it takes seconds; with --bits 3.5 or --size 90MB it searches
    first, which takes minutes (--search-minutes) unless an earlier search is kept.

    Example: [bold]pocketlm plan Qwen/Qwen3-8B --scheme W4A16[/bold]
    """
    wanted, settings = flags.read(locals())
    plan = planned(source, wanted, settings, quiet=False, log_file=None)
    return Answer(plan, lambda console: draw_plan(console, plan))


def planned(
    source: str,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    *,
    quiet: bool,
    log_file: Path | None,
) -> Plan:
    """A plan; the progress of what it needs, such as a budget's search, is drawn.

    Args:
        source: A model.
        wanted: Keyword arguments of `api.build_recipe`.
        settings: Keyword arguments of `api.plan`.
        quiet: Draw nothing.
        log_file: Each event is appended here.
    """
    from pocketlm import api
    from pocketlm.cli.progress import progress

    with progress(quiet=quiet, log_file=log_file) as on_event:
        return api.plan(source, api.build_recipe(**wanted), on_event=on_event, **settings)


def draw_plan(console: Console, plan: Plan) -> None:
    """Draws a plan: what comes out, what it takes, what is left out and changed.

    Args:
        console: Where to.
        plan: The prediction.
    """
    draw.facts(
        console,
        f"{plan.source} → {plan.method}, {plan.format} for {plan.target}",
        {
            **({"smaller model": "; ".join(plan.smaller)} if plan.smaller else {}),
            "output": f"{bytes_text(plan.output_bytes)}, from {bytes_text(plan.source_bytes)}",
            "bits per weight": f"{plan.bits_per_weight:.3f} in {plan.linears} linears of "
            f"{plan.blocks} blocks",
            "grids": "; ".join(f"{count} × {grid}" for grid, count in plan.grids.items())
            or "values as they are",
            "sparsity": plan.sparsity or "none",
            **{name: grid for name, grid in plan.ends.items()},
            "inputs": plan.inputs or "as they come",
            **({} if plan.proof is None else {f"in {plan.target}": plan.proof}),
            "calibration": _calibration(plan),
            **_text(plan),
            "peak RAM": bytes_text(plan.peak_ram_bytes),
            "peak VRAM": bytes_text(plan.peak_vram_bytes) if plan.peak_vram_bytes else "none",
            "disk beside the output": bytes_text(plan.disk_transient_bytes),
            "time": f"{seconds_text(plan.seconds)} on {plan.device}",
            "after a kill, at worst": f"{seconds_text(plan.resume_seconds)} more",
        },
    )
    draw.grouped(console, "Kept as they are", plan.kept)
    draw.grouped(console, "Changed", plan.notes)
    draw.warnings(console, plan.warnings)


def _calibration(plan: Plan) -> str:
    if not plan.samples:
        return "none needed"
    return f"{plan.samples} × {plan.seq_len} tokens, activations in {plan.activations}"


def _text(plan: Plan) -> dict[str, str]:
    """What is known of the calibration text, in one line; experts in another."""
    lines: dict[str, str] = {}
    if plan.text is not None:
        lines["calibration text"] = (
            f"{plan.text.tokens:,} tokens ({plan.text.different_tokens:,} different), "
            f"{plan.text.duplicate_windows} duplicate windows, "
            f"{percent_text(plan.text.repeated_share)} repeated, "
            f"{percent_text(plan.text.special_share)} special tokens"
        )
    if plan.tokens_per_expert is not None:
        lines["tokens for an expert"] = (
            f"{plan.tokens_per_expert:,.0f} if all are used alike; some get far fewer"
        )
    return lines
