"""One prompt, one answer, streamed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Device,
    DrawSeed,
    Json,
    MaxNewTokens,
    Model,
    Temperature,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.report.words import seconds_text


def run(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: DrawSeed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; no chat template.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Answer one prompt, from packed weights.

    Example: [bold]pocketlm generate out --prompt "What is gravity?"[/bold]
    """
    flags.check_machine(device, None)
    from pocketlm import api
    from pocketlm.runtime.generate import generate

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    result = generate(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=not raw,
        on_text=None if json else stream,
    )
    value = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    return Answer(value, lambda console: _draw(console, result))


def stream(text: str) -> None:
    """Writes a piece of an answer at once."""
    sys.stdout.write(draw.printable(text))
    sys.stdout.flush()


def _draw(console: Console, result: Any) -> None:
    console.print()
    if result.tokens_per_second:
        speed = f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} a second"
        first = f"first after {seconds_text(result.seconds_prefill)}"
        console.print(f"({speed}, {first})", style="dim")
