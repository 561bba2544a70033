"""An artifact in another form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketlm.cli.options import Artifact, Json, Output
from pocketlm.cli.output import Answer

if TYPE_CHECKING:
    from pocketlm.engine.export import Export

To = Annotated[
    str, typer.Option("--to", help="The form: dense, gguf, or gguf:TYPE such as gguf:Q4_K_M.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Of decoded weights: bfloat16, float16, float32."),
]


def run(
    path: Artifact, output: Output, to: To = "dense", dtype: Dtype = None, json: Json = False
) -> Answer:
    """Write an artifact in another form, and say what that costs.

    dense: every weight decoded, factors multiplied: an ordinary checkpoint for any tool.

    gguf: one file for llama.cpp, of an artifact or of any model: codes are kept where a type holds
    them. gguf:Q4_K_M and its like: the types that llama-quantize would take.

    Example: [bold]pocketlm export out --to dense -o out-dense[/bold]
    Example: [bold]pocketlm export out --to gguf -o model.gguf[/bold]
    """
    from pocketlm import api

    made = api.export(path, output, to=to, dtype=dtype)
    return Answer(made, lambda console: _draw(console, made))


def _draw(console: Console, made: Export) -> None:
    from pocketlm.report.words import bytes_text

    times = made.bytes_after / max(made.bytes_before, 1)
    console.print(f"Wrote [bold]{escape(str(made.output))}[/bold]: {made.form}, {made.dtype}.")
    console.print(
        f"{bytes_text(made.bytes_before)} became {bytes_text(made.bytes_after)}: "
        f"{times:.2f} times the bytes."
    )
    for note in made.notes:
        console.print(f"[dim]{escape(note[0].upper() + note[1:])}[/dim]")
