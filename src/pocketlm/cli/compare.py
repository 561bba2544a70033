"""Several models on the same text, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Against,
    Device,
    EvalSeqLen,
    Json,
    Limit,
    LogFile,
    Models,
    Quiet,
    Speed,
    Text,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.cli.progress import progress
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import interval_text, number_text, percent_text, signed_text

if TYPE_CHECKING:
    from pocketlm.evaluate.results import QualityReport, SpeedReport
    from pocketlm.report.measure import Measurement


def run(
    models: Models,
    against: Against = None,
    text: Text = None,
    limit: Limit = None,
    seq_len: EvalSeqLen = 2048,
    speed: Speed = False,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Evaluate models on the same windows; the first is the original unless --against names it.

    Example: [bold]pocketlm compare Qwen/Qwen3-8B out-w4 out-w3[/bold]
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
            speed=speed,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
    return Answer(found, lambda console: _draw(console, found))


def _draw(console: Console, found: list[Measurement]) -> None:
    first = found[0].quality
    original = first.divergence
    rows = [
        ["perplexity", "–" if original is None else number_text(original.original_perplexity, 4)]
    ]
    rows += [["loss over the original, nats", "0"], ["95 % interval", ""]]
    rows += [["KL to the original, mean nats", "0"], ["same top token", "100 %"]]
    for measurement in found:
        for row, cell in zip(rows, _cells(measurement.quality), strict=True):
            row.append(cell)
    if any(measurement.speed for measurement in found):
        speeds = [found[0].original_speed, *(measurement.speed for measurement in found)]
        rows.append(
            ["prefill, tokens/s", *(_speed(s, "prefill_tokens_per_second") for s in speeds)]
        )
        rows.append(["decode, tokens/s", *(_speed(s, "decode_tokens_per_second") for s in speeds)])
    names = [found[0].against or "–", *(measurement.model for measurement in found)]
    draw.table(console, ("", *(f"{name}>" for name in names)), rows)
    console.print(first.protocol.sentence(), style="dim", markup=False)


def _cells(quality: QualityReport) -> list[str]:
    found = quality.divergence
    if found is None:
        return [number_text(quality.perplexity, 4), "–", "", "–", "–"]
    return [
        number_text(quality.perplexity, 4),
        signed_text(found.loss_over_original.value),
        interval_text(found.loss_over_original, signed=True),
        number_text(found.kl_mean.value),
        percent_text(found.top1_agreement.value),
    ]


def _speed(report: SpeedReport | None, field: str) -> str:
    return "–" if report is None else number_text(report.model_dump()[field])
