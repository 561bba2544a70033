"""The main job: a model in, an artifact out."""

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
    DryRun,
    Dtype,
    GroupSize,
    Ignore,
    Json,
    LogFile,
    Method,
    Output,
    Quiet,
    RecipeName,
    Restart,
    Resume,
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
    WorkDir,
)
from pocketlm.cli.output import Answer
from pocketlm.cli.units import parse_bytes


def run(
    source: Source,
    output: Output,
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
    work_dir: WorkDir = None,
    activation_budget: ActivationBudget = None,
    resume: Resume = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    log_file: LogFile = None,
    quiet: Quiet = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Compress a model to OUTPUT, an ordinary Hugging Face directory.

    Without further flags: W4A16, symmetric, group 128, GPTQ.
    Interrupted? The same command goes on from the last finished block.

    Example: [bold]pocketlm compress Qwen/Qwen3-8B -o out[/bold]
    """
    flags.check_machine(device, dtype, target)
    flags.check_resume(resume, restart)
    wanted = flags.recipe_flags(
        recipe=recipe,
        method=method,
        scheme=scheme,
        bits=bits,
        group_size=group_size,
        sym=sym,
        asym=asym,
    )
    settings: dict[str, Any] = {
        "ignore": tuple(ignore or ()),
        "target": target,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "activation_budget_bytes": parse_bytes(activation_budget, "--activation-budget"),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    from pocketlm import api

    built = api.build_recipe(**wanted)
    if dry_run:
        from pocketlm.cli.plan import draw_plan

        plan = api.plan(source, built, **settings)
        return Answer(plan, lambda console: draw_plan(console, source, plan))

    from pocketlm.cli.progress import progress

    with progress(quiet=quiet, log_file=log_file) as on_event:
        result = api.compress(
            source,
            built,
            output,
            work_dir=work_dir,
            resume=not restart,
            on_event=on_event,
            **settings,
        )
    return Answer(result, lambda console: _draw(console, result))


def _draw(console: Console, result: Any) -> None:
    draw.facts(console, f"Wrote {result.output}", {})
