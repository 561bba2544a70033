"""The main job: a model in, an artifact out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

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
    WorkDir,
)
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text, error_text, seconds_text

if TYPE_CHECKING:
    from pocketlm.api import CompressResult
    from pocketlm.report.data import InputRow


def run(
    source: Source,
    output: Output,
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
    work_dir: WorkDir = None,
    activation_budget: ActivationBudget = None,
    search_minutes: SearchMinutes = None,
    search_dir: SearchDir = None,
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
    With --bits 3.5 or --size 90MB: the best grid for each layer within that budget.
    Interrupted? The same command goes on from the last finished block.

    Example: [bold]pocketlm compress Qwen/Qwen3-8B -o out[/bold]
    """
    wanted, settings = flags.read(locals())
    flags.check_resume(resume, restart)
    if dry_run:
        from pocketlm.cli.plan import draw_plan, planned

        plan = planned(source, wanted, settings, quiet=quiet, log_file=log_file)
        return Answer(plan, lambda console: draw_plan(console, plan))

    from pocketlm import api
    from pocketlm.cli.progress import progress

    with progress(quiet=quiet, log_file=log_file) as on_event:
        result = api.compress(
            source,
            api.build_recipe(**wanted),
            output,
            work_dir=work_dir,
            resume=not restart,
            on_event=on_event,
            **settings,
        )
    return Answer(result, lambda console: _draw(console, result))


def _draw(console: Console, result: CompressResult) -> None:
    plan = result.plan
    verb = "Already there" if result.already_done else "Wrote"
    console.print(f"[bold]{verb}[/bold] {escape(str(result.output))}")
    total = sum(result.seconds.values())
    rows = [
        ("weights on disk", bytes_text(plan.output_bytes), bytes_text(result.output_bytes)),
        ("bits per weight", f"{plan.bits_per_weight:.3f}", f"{result.bits_per_weight:.3f}"),
        ("peak RAM", bytes_text(plan.peak_ram_bytes), bytes_text(result.peak_ram_bytes)),
        ("time", seconds_text(plan.seconds), seconds_text(total) if total else "–"),
    ]
    draw.table(console, ("", "predicted>", "came out>"), rows)
    if result.mean_error is not None:
        error = error_text(result.mean_error)
        console.print(f"mean output error of a linear on the calibration text: {error}")
    if result.inputs:
        console.print(_inputs(result.inputs))
    draw.grouped(console, "Kept as they are", plan.kept)
    draw.grouped(console, "Changed", plan.notes)
    draw.warnings(console, result.warnings)
    if plan.format == "pocketlm":
        console.print(
            f'load:   pocketlm.load("{escape(str(result.output))}"); transformers after '
            "`import pocketlm.hf`, which refuses it otherwise",
            soft_wrap=True,
        )
    console.print(f"report: {escape(str(result.report))}")
    console.print(f"next:   pocketlm verify {escape(str(result.output))}")


def _inputs(rows: list[InputRow]) -> str:
    """What reached the linears, in one line; the report has it by kind."""
    widths = sorted({row.columns for row in rows})
    ranks = [rank for row in rows for rank in (row.rank_least, row.rank_most) if rank is not None]
    parts = [f"{min(row.tokens_least for row in rows):,} tokens or more"]
    if ranks:
        span = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
        parts.append(f"effective rank {min(ranks):,.0f} to {max(ranks):,.0f} of {span}")
    parts.append(f"{sum(row.dead_columns for row in rows)} dead")
    few, unreached = sum(row.few for row in rows), sum(row.unreached for row in rows)
    if few or unreached:
        parts.append(f"{few} linears with few tokens, {unreached} with none")
    return f"inputs of the linears: {', '.join(parts)}"
