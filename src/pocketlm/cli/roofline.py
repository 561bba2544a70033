"""What a device allows a model: by operator, for prefill and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.bench import Batch
from pocketlm.cli.options import Json, Source, TrustRemoteCode
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text, number_text, percent_text

if TYPE_CHECKING:
    from pocketlm.evaluate.roofline import Pass, RooflineReport


def run(
    source: Source,
    device: Annotated[
        str, typer.Option("--device", help="h100, rtx-4090, m3-max …; auto measures this machine.")
    ] = "auto",
    batch: Batch = 1,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Positions that a step of decoding reads.")
    ] = 1024,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "--prompt", min=1, help="Of the prefill, each row.")
    ] = 512,
    weight_bits: Annotated[
        float | None,
        typer.Option("--weight-bits", help="Real bits of a weight; default: as stored."),
    ] = None,
    head_bits: Annotated[
        float | None, typer.Option("--head-bits", help="Of the head; default: as stored.")
    ] = None,
    activation_bits: Annotated[
        int, typer.Option("--activation-bits", help="Of activations; 8 uses 8-bit units.")
    ] = 16,
    kv_bits: Annotated[int, typer.Option("--kv-bits", help="Of keys and values.")] = 16,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the model too; with --device auto only.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the roofline as an SVG here.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Show what bounds each operator on a device, and the time that prefill and decoding take.

    Reads config.json alone; no weights are loaded unless --measure asks to run the model.

    Example: [bold]pocketlm roofline Qwen/Qwen3-8B --device h100 --weight-bits 4.25[/bold]
    """
    from pocketlm import api

    found = api.roofline(
        source,
        device=device,
        batch=batch,
        context=context,
        prompt_tokens=prompt_tokens,
        weight_bits=weight_bits,
        head_bits=head_bits,
        activation_bits=activation_bits,
        cache_bits=kv_bits,
        measure=measure,
        trust_remote_code=trust_remote_code,
    )
    if plot is not None:
        from pocketlm.report.roofline_plot import write_plot

        write_plot(found, plot)
    return Answer(found, lambda console: _draw(console, found, plot))


def _draw(console: Console, found: RooflineReport, plot: Path | None) -> None:
    device = found.device
    rates = ", ".join(f"{kind} {number_text(r / 1e12)}" for kind, r in device.rates.items())
    draw.facts(
        console,
        f"{found.model} on {device.title}",
        {
            "device": f"{bytes_text(device.bandwidth)}/s; TFLOP/s: {rates}; "
            f"ridge at {number_text(found.ridge)} operations a byte",
            "weights": f"{bytes_text(found.weight_bytes)}, {number_text(found.weight_bits)} bits; "
            f"head {number_text(found.head_bits)} bits",
            "cache": f"{bytes_text(found.cache_bytes)} for {found.batch} × {found.context} tokens, "
            f"{found.cache_bits} bits",
            "memory": f"{bytes_text(device.memory_bytes)}: "
            + ("fits" if found.fits else "does not fit"),
        },
    )
    for done in (found.prefill, found.decode):
        _draw_pass(console, done)
    rows = [
        ("bound", found.prefill.tokens_per_second, found.decode.tokens_per_second),
        (
            "predicted",
            found.prefill.predicted_tokens_per_second,
            found.decode.predicted_tokens_per_second,
        ),
    ]
    if found.measured is not None:
        run = found.measured
        rows.append(("measured", run.prefill_tokens_per_second, run.decode_tokens_per_second))
    shown = [(name, *map(number_text, speeds)) for name, *speeds in rows if speeds[1] is not None]
    draw.table(console, ("\ntokens/s", "prefill>", "decode>"), shown)
    if plot is not None:
        console.print(f"\nThe plot: {plot}", markup=False)


def _draw_pass(console: Console, done: Pass) -> None:
    rows = [
        (
            operator.name,
            operator.count,
            number_text(operator.operations / 1e9),
            bytes_text(operator.weight_bytes),
            bytes_text(operator.activation_bytes + operator.cache_bytes),
            number_text(operator.intensity),
            operator.bound,
            f"{number_text(1e3 * operator.seconds)} ms",
            percent_text(operator.seconds / done.seconds),
        )
        for operator in done.operators
    ]
    heads = (
        f"\n{done.name}, {done.tokens} tokens", "count>", "GFLOP>", "weights>", "other bytes>",
        "FLOP/byte>", "bound by", "time>", "share>",
    )  # fmt: skip
    draw.table(console, heads, rows)
