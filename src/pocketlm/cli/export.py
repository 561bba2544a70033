"""An artifact in another form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketlm.cli.options import Json, Output, Source
from pocketlm.cli.output import Answer

if TYPE_CHECKING:
    from pocketlm.engine.export import Export

To = Annotated[
    str,
    typer.Option(
        "--to",
        help="The form: dense, compressed-tensors, gptq, gptq_v2, awq, mlx, onnx, gguf, or "
        "gguf:TYPE such as gguf:Q4_K_M.",
    ),
]
For = Annotated[
    str | None,
    typer.Option("--target", help="The engine that is to load it; refused where it cannot."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Of decoded weights: bfloat16, float16, float32."),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(
        "--engine-python",
        help="For onnx: the Python that has ONNX Runtime GenAI, such as onnx-env/bin/python; "
        "default: $POCKETLM_ONNX_PYTHON, else this one.",
        show_default=False,
    ),
]


def run(
    path: Source,
    output: Output,
    to: To = "dense",
    dtype: Dtype = None,
    target: For = None,
    engine_python: EnginePython = None,
    json: Json = False,
) -> Answer:
    """Write a compressed model in another form, and say what that costs.

    dense: every weight decoded, factors multiplied: an ordinary checkpoint for any tool. The other
    forms keep the codes. The model may come from another tool: GPTQ, AWQ, compressed-tensors.

    gguf: one file for llama.cpp, of any model. gguf:Q4_K_M and its like: in the types that
    llama-quantize would take.

    onnx: a directory for ONNX Runtime GenAI, of its own builder, with the codes as they are.

    Example: [bold]pocketlm export out --to gptq --target vllm -o out-gptq[/bold]
    Example: [bold]pocketlm export out --to gguf -o model.gguf[/bold]
    """
    from pocketlm import api

    made = api.export(path, output, to=to, dtype=dtype, target=target, engine_python=engine_python)
    return Answer(made, lambda console: _draw(console, made))


def _draw(console: Console, made: Export) -> None:
    from pocketlm.report.words import bytes_text

    times = made.bytes_after / max(made.bytes_before, 1)
    said = made.decoded and made.dtype not in ("as stored", "by type")
    kind = f"{made.form}, {made.dtype}" if said else made.form
    console.print(f"Wrote [bold]{escape(str(made.output))}[/bold]: {kind}.")
    console.print(
        f"{bytes_text(made.bytes_before)} became {bytes_text(made.bytes_after)}: "
        f"{times:.2f} times the bytes."
    )
    for note in made.notes:
        console.print(f"[dim]{escape(note[0].upper() + note[1:])}[/dim]")
