"""Quality, speed and memory of a model, beside its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Against,
    Device,
    Json,
    Limit,
    Model,
    Quiet,
    SeqLen,
    Text,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer


def run(
    model: Model,
    against: Against = None,
    text: Text = None,
    limit: Limit = None,
    seq_len: SeqLen = 2048,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Let the model and the original answer this.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Measure perplexity and speed; with --against, the divergence from the original.

    An artifact keeps the figures: they go into its report.html.

    Example: [bold]pocketlm eval out --against Qwen/Qwen3-8B[/bold]
    """
    raise NotImplementedError
