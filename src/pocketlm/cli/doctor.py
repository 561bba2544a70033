"""What this machine has, and which kernels run here."""

from __future__ import annotations

from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.options import Json
from pocketlm.cli.output import Answer


def run(json: Json = False) -> Answer:
    """Show versions, memory, devices, and which bits and groups have a kernel.

    Example: [bold]pocketlm doctor[/bold]
    """
    from pocketlm.runtime.doctor import doctor

    found = doctor()

    def show(console: Console) -> None:
        draw.facts(console, "pocketlm doctor", found.model_dump())

    return Answer(found, show)
