"""The before/after table and the page of an artifact, made anew from its kept figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pocketlm.cli.eval import draw_report
from pocketlm.cli.options import Artifact, Json
from pocketlm.cli.output import Answer

if TYPE_CHECKING:
    from pocketlm.report.data import ReportData


def run(path: Artifact, json: Json = False) -> Answer:
    """Show the before/after table of an artifact and write its report.html anew.

    Measures nothing: what is missing, `pocketlm eval` measures.

    Example: [bold]pocketlm report out[/bold]
    """
    from pocketlm import api
    from pocketlm.report.data import read_metrics

    data = read_metrics(path)
    page = api.report(path)
    value = {"page": str(page), "metrics": data.model_dump(mode="json")}
    return Answer(value, lambda console: _draw(console, data, page))


def _draw(console: Console, data: ReportData, page: Path) -> None:
    draw_report(console, data)
    console.print(f"\nThe whole report: {escape(str(page))}")
