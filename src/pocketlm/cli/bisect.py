"""Which layers of an artifact hurt most, and what it would cost to keep them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketlm.cli import draw, flags
from pocketlm.cli.options import (
    Artifact,
    CacheDir,
    Device,
    Json,
    LogFile,
    Quiet,
    RecipeFile,
    Target,
    Text,
    Threads,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer
from pocketlm.cli.progress import progress
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import bytes_text, number_text, percent_text, seconds_text

if TYPE_CHECKING:
    from pocketlm.search.bisect_source import BisectResult

Original = Annotated[str, typer.Option("--against", help="The original.", show_default=False)]
Worst = Annotated[int, typer.Option("--worst", min=1, help="How many layers to find.")]
Windows = Annotated[
    int, typer.Option("--limit", min=1, help="Windows of text; all of them run as one batch.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", "--seqlen", min=2, help="Tokens of a window.")]


def run(
    path: Artifact,
    against: Original,
    worst: Worst = 5,
    output: RecipeFile = None,
    text: Text = None,
    limit: Windows = 4,
    seq_len: SeqLen = 512,
    target: Target = "vllm",
    device: Device = "auto",
    threads: Threads = None,
    cache_dir: CacheDir = None,
    log_file: LogFile = None,
    quiet: Quiet = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Find the layers whose compression costs most KL, and write a recipe that keeps them.

    Puts the original's weights back by halves of the model, so that few measurements find the few
    layers that hurt. What the target runs as one layer is one unit. Goes on where it was stopped.

    Example: [bold]pocketlm bisect out --against Qwen/Qwen3-8B -o better.yaml[/bold]
    """
    flags.check_machine(device, None, target)
    from pocketlm import api

    with progress(quiet=quiet, log_file=log_file) as on_event:
        found = api.bisect(
            path,
            against,
            worst=worst,
            text=text,
            limit=limit,
            seq_len=seq_len,
            target=target,
            device=device,
            threads=threads,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
    if output is not None:
        if found.recipe is None:
            raise ConfigError(
                "keeps no recipe that could be rewritten.",
                where=str(path),
                remedy=f"Use --ignore '{found.ignore[0]}'." if found.ignore else None,
            )
        flags.write_recipe(output, found.recipe)
    return Answer(found, lambda console: _draw(console, found, output))


def _draw(console: Console, found: BisectResult, output: Path | None) -> None:
    rows = [
        (
            culprit.name,
            number_text(culprit.gain),
            percent_text(culprit.gain / found.kl) if found.kl else "–",
            number_text(culprit.kl_left),
            bytes_text(culprit.bytes_kept - culprit.bytes_now),
        )
        for culprit in found.culprits
    ]
    columns = ("worst first", "KL it costs>", "of all>", "KL left>", "bytes to keep it>")
    draw.table(console, columns, rows)
    console.print(
        f"KL of the artifact: {number_text(found.kl)} nats a token; with every layer restored "
        f"{number_text(found.kl_all_restored)}. KL left: with that layer and all above it restored."
    )
    draw.warnings(console, found.notes)
    console.print(
        f"{found.measurements} KLs for {found.units} units, on {escape(found.text)}; "
        f"{seconds_text(found.seconds)}; kept in {escape(found.table)}",
        soft_wrap=True,
    )
    for pattern in found.ignore:
        console.print(f"--ignore '{escape(pattern)}'", soft_wrap=True)
    if output is not None:
        name = escape(str(output))
        console.print(f"recipe: {name}\nnext:   pocketlm compress MODEL -o out --recipe {name}")
