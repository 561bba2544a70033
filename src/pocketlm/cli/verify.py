"""Proof that an artifact is what its ledger says, and that an engine runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketlm.cli.options import Against, Json
from pocketlm.cli.output import Answer
from pocketlm.core.errors import ArtifactError

if TYPE_CHECKING:
    from pocketlm.evaluate.verify import Check, VerifyReport

MARKS = {
    "passed": "[green]✓[/green]",
    "failed": "[red]✗[/red]",
    "not checked": "[yellow]–[/yellow]",
}
_ENGINE = "A real engine"

Checked = Annotated[
    Path,
    typer.Argument(
        help="A directory that compress wrote; with --engine also an export or a .gguf file.",
        show_default=False,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="transformers, vllm, llama.cpp or onnxruntime: loads it and is compared with our own "
        "run.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(
        "--engine-python",
        help="The Python that has it, such as vllm-env/bin/python; default: "
        "$POCKETLM_VLLM_PYTHON or $POCKETLM_ONNX_PYTHON, else this one.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
EnginePath = Annotated[
    Path | None,
    typer.Option(
        "--engine-path",
        help="llama.cpp: the directory with node_modules/node-llama-cpp; default: "
        "$POCKETLM_LLAMA_CPP, else the current one.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel",
        min=1,
        help="Over how many GPUs the engine is to split it.",
        rich_help_panel=_ENGINE,
    ),
]


def run(
    path: Checked,
    against: Against = None,
    engine: Engine = None,
    engine_python: EnginePython = None,
    engine_path: EnginePath = None,
    tensor_parallel: TensorParallel = 1,
    json: Json = False,
) -> Answer:
    """Reload the written files by the target engine's rules and check everything.

    With --engine that engine loads them, in a process of its own; its log-probabilities on fixed
    text and its greedy answers are compared with ours. Exit code 2 if a check fails.

    Example: [bold]pocketlm verify out[/bold]
    Example: [bold]pocketlm verify out --engine vllm --engine-python vllm-env/bin/python[/bold]
    """
    from pocketlm import api

    with _progress(quiet=json) as on_check:
        found = api.verify(
            path, against, engine=engine, engine_python=engine_python, engine_path=engine_path,
            tensor_parallel=tensor_parallel, on_check=on_check,
        )  # fmt: skip
    failed = found.failures()
    failure = None
    if failed:
        failure = ArtifactError(
            f"{len(failed)} of {len(found.checks)} checks failed, first '{failed[0].name}'.",
            where=str(path),
            remedy="Do not use it as a result of pocketlm; each check says what to do."
            if engine is None
            else f"Do not use it with {engine}; docs/capabilities.md tells what it runs.",
        )
    return Answer(found, lambda console: _draw(console, found), failure)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Check], None]]:
    """Names each check on standard error as it ends, on a terminal."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda check: None
        return
    with console.status("checking …") as status:
        yield lambda check: status.update(f"{MARKS[check.status]} {escape(check.name)} …")


def _draw(console: Console, found: VerifyReport) -> None:
    for check in found.checks:
        console.print(f"{MARKS[check.status]} {check.name}  [dim]{escape(check.message)}[/dim]")
    if found.ok:
        passed = sum(check.status == "passed" for check in found.checks)
        console.print(f"[bold]Verified[/bold]: {passed} checks passed.")
