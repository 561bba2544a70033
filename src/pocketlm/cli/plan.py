"""Prediction before work: what a compress with the same flags would cost and give."""

from __future__ import annotations

from typing import Any

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
    Seed,
    SeqLen,
    Source,
    Sym,
    Target,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.cli.units import parse_bytes


def run(
    source: Source,
    recipe: RecipeName = None,
    method: Method = None,
    scheme: Scheme = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    sym: Sym = False,
    asym: Asym = False,
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
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Predict bytes, memory, disk and time, and refuse what cannot work.

    Example: [bold]pocketlm plan Qwen/Qwen3-8B --scheme W4A16[/bold]
    """
    flags.check_machine(device, dtype, target)
    wanted = flags.recipe_flags(
        recipe=recipe,
        method=method,
        scheme=scheme,
        bits=bits,
        group_size=group_size,
        sym=sym,
        asym=asym,
    )
    from pocketlm import api

    plan = api.plan(
        source,
        api.build_recipe(**wanted),
        ignore=tuple(ignore or ()),
        target=target,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        threads=threads,
        activation_budget_bytes=parse_bytes(activation_budget, "--activation-budget"),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Answer(plan, lambda console: draw_plan(console, source, plan))


def draw_plan(console: Console, source: str, plan: Any) -> None:
    """Draws a plan as facts, then what is left out, then warnings."""
    draw.facts(console, source, plan.model_dump())
