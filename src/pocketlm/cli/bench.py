"""How fast a model runs here, and how far from what the machine allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pocketlm.cli import draw, flags
from pocketlm.cli.options import Device, Json, Model, Threads, TrustRemoteCode
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text, number_text, percent_text, seconds_text

if TYPE_CHECKING:
    from pocketlm.evaluate.results import SpeedReport

Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows decoded at once.")]
Prompt = Annotated[int, typer.Option("--prompt-tokens", "--prompt", min=1, help="Of each row.")]


def run(
    model: Model,
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "--new", min=2, help="Tokens to generate.")
    ] = 64,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Positions held when decoding begins."),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="After a warm-up.")] = 3,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of activations: float32, bfloat16, float16.")
    ] = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Measure prefill, decoding, latencies and memory, each beside what the machine allows.

    Example: [bold]pocketlm bench out --batch 8[/bold]
    """
    flags.check_machine(device, dtype)
    from pocketlm import api

    found = api.bench(
        model,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        context=context,
        runs=runs,
        device=device,
        dtype=dtype,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    return Answer(found, lambda console: draw_speed(console, model, found))


def draw_speed(console: Console, title: str, found: SpeedReport) -> None:
    """Draws what was measured.

    Args:
        console: Where to.
        title: The model.
        found: Its figures.
    """
    rate, prefill = found.rate_operations_per_second, found.prefill_operations_per_second
    decode = found.decode_operations_per_second
    shares = {
        "prefill": "" if not rate or not prefill else f"{percent_text(prefill / rate)} of the rate",
        "decode": f"{percent_text(found.decode_tokens_per_second / found.bound_tokens_per_second)}"
        " of the bandwidth's bound",
    }
    draw.table(
        console,
        (title, "tokens/s>", "TFLOP/s>", "GB/s>", "of the bound"),
        [
            (
                "prefill",
                number_text(found.prefill_tokens_per_second),
                number_text(None if prefill is None else prefill / 1e12),
                "",
                shares["prefill"],
            ),
            (
                "decode",
                number_text(found.decode_tokens_per_second),
                number_text(None if decode is None else decode / 1e12),
                number_text(found.achieved_bytes_per_second / 1e9),
                shares["decode"],
            ),
        ],
    )
    draw.facts(
        console,
        "",
        {
            "first token": seconds_text(found.first_token_seconds),
            "between tokens": f"{_milliseconds(found.token_seconds_p50)} median, "
            f"{_milliseconds(found.token_seconds_p99)} p99",
            "peak memory": bytes_text(found.peak_memory_bytes)
            + (
                ""
                if found.peak_device_memory_bytes is None
                else f", {bytes_text(found.peak_device_memory_bytes)} of the device"
            ),
            "this machine": f"copies {number_text(found.bandwidth_bytes_per_second / 1e9)} GB/s, "
            f"multiplies {number_text((rate or 0) / 1e12)} TFLOP/s (measured)",
            "loop": found.loop or "",
        },
    )
    console.print(found.sentence(), style="dim", markup=False)
    draw.warnings(console, found.notes)


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{number_text(1e3 * seconds)} ms"
