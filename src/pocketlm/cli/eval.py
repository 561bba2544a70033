"""Quality, speed and memory of a model, beside its original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Against,
    CacheDir,
    Device,
    EvalSeqLen,
    Gates,
    Items,
    Json,
    Limit,
    LogFile,
    Margin,
    Model,
    Quiet,
    Speed,
    TaskData,
    TaskDir,
    Tasks,
    Text,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.cli.progress import progress
from pocketlm.report.words import (
    bytes_text,
    interval_text,
    number_text,
    percent_text,
    points_text,
    share_text,
    signed_text,
)

if TYPE_CHECKING:
    from pocketlm.evaluate.results import QualityReport
    from pocketlm.report.data import ReportData
    from pocketlm.report.measure import Measurement

WORST, CONTEXT = 3, 48  # tokens shown, characters before each
MARKS = {"pass": "[green]✓[/green]", "fail": "[red]✗[/red]", "inconclusive": "[yellow]?[/yellow]"}


def run(
    model: Model,
    against: Against = None,
    text: Text = None,
    limit: Limit = None,
    seq_len: EvalSeqLen = 2048,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Let the model and the original answer this.")
    ] = None,
    gate: Gates = None,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    task_data: TaskData = None,
    items: Items = None,
    margin: Margin = 0.01,
    cache_dir: CacheDir = None,
    speed: Speed = True,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Measure perplexity, speed and memory; with --against, the divergence from the original.

    An artifact keeps the figures: they go into its report.html. --tasks asks both the same items.
    Exit code with --gate: 0 all passed, 4 one failed, 5 none failed but one is inconclusive.

    Example: [bold]pocketlm eval out --against Qwen/Qwen3-8B[/bold]
    """
    flags.check_machine(device, None)
    from pocketlm import api

    with progress(quiet=quiet, log_file=log_file) as on_event:
        found = api.evaluate(
            model,
            against,
            text=text,
            limit=limit,
            seq_len=seq_len,
            prompt=prompt,
            gates=gate or (),
            tasks=flags.names(tasks),
            task_dir=task_dir,
            task_data=task_data,
            items=items,
            margin=margin,
            cache_dir=cache_dir,
            speed=speed,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
    return Answer(found, lambda console: _draw(console, found), found.gate_failure())


def _draw(console: Console, found: Measurement) -> None:
    if found.report is None:
        draw.facts(console, found.model, _figures(found))
        console.print(found.quality.protocol.sentence(), style="dim", markup=False)
        draw.warnings(console, found.quality.notes)
    else:
        from pocketlm.report.data import read_metrics

        draw_report(console, read_metrics(found.model))
    _draw_worst(console, found.quality)
    for answer in found.answers:
        console.print(f"\n[bold]{escape(answer.prompt)}[/bold]")
        said = {"before": answer.original, "after": answer.compressed}
        draw.facts(console, "", {who: draw.printable(text) for who, text in said.items()})
    _draw_tasks(console, found)
    for gate in found.gates:
        console.print(f"{MARKS[gate.verdict]} {escape(gate.message)}")
    if found.report is not None:
        console.print(f"\nThe whole report: {escape(str(found.report))}")


def _draw_worst(console: Console, quality: QualityReport) -> None:
    """The tokens of largest KL, in their context."""
    worst = () if quality.divergence is None else quality.divergence.worst_tokens[:WORST]
    rows = [
        (
            number_text(token.kl),
            _one_line(token.context)[-CONTEXT:],
            *map(_one_line, (token.token, token.original_choice, token.model_choice)),
        )
        for token in worst
        if token.context is not None
    ]
    if rows:
        columns = ("KL>", "worst tokens: after …", "came", "original's choice", "model's choice")
        draw.table(console, columns, rows)


def _one_line(text: str | None) -> str:
    """A piece of text on one line, without what would steer a terminal."""
    return draw.printable(text or "").replace("\n", "↵").replace("\t", " ")


def _draw_tasks(console: Console, found: Measurement) -> None:
    if not found.tasks:
        return
    rows: list[tuple[str, ...]] = []
    for result in found.tasks:
        pair = result.comparison
        score = percent_text(result.score.value)
        if pair is None:
            rows.append((result.task, "–", score, "", share_text(result.score), "", ""))
            continue
        rows.append(
            (
                result.task,
                percent_text(pair.original.value),
                score,
                points_text(pair.change.value),
                f"{points_text(pair.change.low)} to {points_text(pair.change.high)}",
                str(pair.flips),
                pair.verdict,
            )
        )
    columns = ("task", "before>", "after>", "change>", "95 % interval>", "flips>", "verdict")
    draw.table(console, columns, rows)
    for result in found.tasks:
        console.print(result.sentence(), style="dim", markup=False)


def _figures(found: Measurement) -> dict[str, str]:
    divergence = found.quality.divergence
    figures = {"perplexity": number_text(found.quality.perplexity, 4)}
    if divergence is not None:
        loss, kl = divergence.loss_over_original, divergence.kl_mean
        figures |= {
            "perplexity of the original": number_text(divergence.original_perplexity, 4),
            "loss over the original": f"{signed_text(loss.value)} nats a token "
            f"({interval_text(loss, signed=True)})",
            "KL to the original": f"{number_text(kl.value)} nats ({interval_text(kl)})",
            "KL: 99 % of tokens below, 99.9 %": f"{number_text(divergence.kl_p99.value)}, "
            f"{number_text(divergence.kl_p99_9.value)} nats",
            "same top token": percent_text(divergence.top1_agreement.value),
        }
    if found.speed is not None:
        figures |= {
            "prefill": f"{number_text(found.speed.prefill_tokens_per_second)} tokens/s",
            "decode": f"{number_text(found.speed.decode_tokens_per_second)} tokens/s",
            "peak memory": bytes_text(found.speed.peak_memory_bytes),
        }
    return figures


def draw_report(console: Console, data: ReportData) -> None:
    """Draws the headline, the before/after table and the protocol.

    Args:
        console: Where to.
        data: What was measured.
    """
    from pocketlm.report.summary import before_after, headline

    console.print(f"[bold]{escape(data.title)}[/bold]  {escape(data.scheme)}")
    rows = [(r.label, r.original, r.compressed, r.change, r.interval) for r in before_after(data)]
    columns = ("", "before>", "after>", "change>", "95 % interval>")
    draw.table(console, columns, rows)
    console.print(escape(headline(data)))
    if data.quality is not None:
        console.print(data.quality.protocol.sentence(), style="dim", markup=False)
        draw.warnings(console, data.quality.notes)
