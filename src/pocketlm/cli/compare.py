"""Several models on the same text, side by side."""

from __future__ import annotations

from pathlib import Path
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
    Items,
    Json,
    Limit,
    LogFile,
    Margin,
    Models,
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
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import (
    bytes_text,
    interval_text,
    number_text,
    percent_text,
    points_text,
    signed_text,
)

if TYPE_CHECKING:
    from pocketlm.evaluate.results import QualityReport, SpeedReport, TaskResult
    from pocketlm.report.measure import Measurement


def run(
    models: Models,
    against: Against = None,
    text: Text = None,
    limit: Limit = None,
    seq_len: EvalSeqLen = 2048,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Where a Pareto plot goes, an .svg file: bytes × KL, and with --speed speed × KL.",
            show_default=False,
        ),
    ] = None,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    task_data: TaskData = None,
    items: Items = None,
    margin: Margin = 0.01,
    cache_dir: CacheDir = None,
    speed: Speed = False,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Evaluate models on the same windows; the first is the original unless --against names it.

    Example: [bold]pocketlm compare Qwen/Qwen3-8B out-w4 out-w3 --plot out.svg[/bold]
    """
    flags.check_machine(device, None)
    if len(models) + (against is not None) < 2:
        raise ConfigError("one model alone.", where="compare", remedy="Name two or more.")
    from pocketlm import api

    with progress(quiet=quiet, log_file=log_file) as on_event:
        found = api.compare(
            *models,
            against=against,
            text=text,
            limit=limit,
            seq_len=seq_len,
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
    if plot is not None:
        _plot(plot, found)
    return Answer(found, lambda console: _draw(console, found, plot))


def _plot(path: Path, found: list[Measurement]) -> None:
    from pocketlm.formats.shards import write_file
    from pocketlm.report.pareto import Point, pareto_svg, size_panel, speed_panel

    sized: list[Point] = []
    timed: list[Point] = []
    for measurement in found:
        divergence, speed = measurement.quality.divergence, measurement.speed
        if divergence is None:
            continue
        name = Path(measurement.model).name
        if measurement.weight_bytes is not None:
            sized.append(Point(name, measurement.weight_bytes, divergence.kl_mean))
        if speed is not None:
            timed.append(Point(name, speed.decode_tokens_per_second, divergence.kl_mean))
    first = found[0]
    panels = [size_panel(sized, first.original_weight_bytes)]
    if timed:
        before = first.original_speed
        panels.append(speed_panel(timed, before and before.decode_tokens_per_second))
    write_file(path, pareto_svg(panels).encode())


def _draw(console: Console, found: list[Measurement], plot: Path | None) -> None:
    first = found[0].quality
    original = first.divergence
    sizes = [found[0].original_weight_bytes, *(measurement.weight_bytes for measurement in found)]
    rows = [
        ["perplexity", "–" if original is None else number_text(original.original_perplexity, 4)]
    ]
    rows += [["loss over the original, nats", "0"], ["95 % interval", ""]]
    rows += [["KL to the original, mean nats", "0"], ["95 % interval", ""]]
    rows += [["KL: 99 % of tokens below, nats", "0"], ["same top token", "100 %"]]
    for measurement in found:
        for row, cell in zip(rows, _cells(measurement.quality), strict=True):
            row.append(cell)
    if any(measurement.speed for measurement in found):
        speeds = [found[0].original_speed, *(measurement.speed for measurement in found)]
        rows.append(
            ["prefill, tokens/s", *(_speed(s, "prefill_tokens_per_second") for s in speeds)]
        )
        rows.append(["decode, tokens/s", *(_speed(s, "decode_tokens_per_second") for s in speeds)])
    rows.insert(0, ["weights on disk", *map(bytes_text, sizes)])
    for results in zip(*(measurement.tasks for measurement in found), strict=True):
        rows.extend(_task_rows(results))
    names = [found[0].against or "–", *(measurement.model for measurement in found)]
    draw.table(console, ("", *(f"{name}>" for name in names)), rows)
    console.print(first.protocol.sentence(), style="dim", markup=False)
    if plot is not None:
        console.print(f"plot: {escape(str(plot))}")


def _task_rows(results: tuple[TaskResult, ...]) -> list[list[str]]:
    """A task's score in every model, and the change with its verdict."""
    first = results[0]
    pairs = [result.comparison for result in results]
    before = "–" if pairs[0] is None else percent_text(pairs[0].original.value)
    scores = [percent_text(result.score.value) for result in results]
    verdicts = [
        ""
        if pair is None
        else f"{points_text(pair.change.low)} to {points_text(pair.change.high)}: {pair.verdict}"
        for pair in pairs
    ]
    return [
        [f"{first.task}, {first.metric}", before, *scores],
        ["change in points, 95 % interval", "", *verdicts],
    ]


def _cells(quality: QualityReport) -> list[str]:
    found = quality.divergence
    if found is None:
        return [number_text(quality.perplexity, 4), "–", "", "–", "", "–", "–"]
    return [
        number_text(quality.perplexity, 4),
        signed_text(found.loss_over_original.value),
        interval_text(found.loss_over_original, signed=True),
        number_text(found.kl_mean.value),
        interval_text(found.kl_mean),
        number_text(found.kl_p99.value),
        percent_text(found.top1_agreement.value),
    ]


def _speed(report: SpeedReport | None, field: str) -> str:
    return "–" if report is None else number_text(report.model_dump()[field])
