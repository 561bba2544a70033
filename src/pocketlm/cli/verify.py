"""Proof that an artifact is what its ledger says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pocketlm.cli.options import Against, Artifact, Json
from pocketlm.cli.output import Answer
from pocketlm.core.errors import ArtifactError

if TYPE_CHECKING:
    from pocketlm.evaluate.verify import VerifyReport

MARKS = {
    "passed": "[green]✓[/green]",
    "failed": "[red]✗[/red]",
    "not checked": "[yellow]–[/yellow]",
}


def run(path: Artifact, against: Against = None, json: Json = False) -> Answer:
    """Reload the written files by the target engine's rules and check everything.

    Exit code 2 if a check fails.

    Example: [bold]pocketlm verify out[/bold]
    """
    from pocketlm import api

    found = api.verify(path, against)
    failed = found.failures()
    failure = None
    if failed:
        failure = ArtifactError(
            f"{len(failed)} of {len(found.checks)} checks failed, first '{failed[0].name}'.",
            where=str(path),
            remedy="Do not use it; compress again with --restart.",
        )
    return Answer(found, lambda console: _draw(console, found), failure)


def _draw(console: Console, found: VerifyReport) -> None:
    for check in found.checks:
        console.print(f"{MARKS[check.status]} {check.name}  [dim]{escape(check.message)}[/dim]")
    if found.ok:
        passed = sum(check.status == "passed" for check in found.checks)
        console.print(f"[bold]Verified[/bold]: {passed} checks passed.")
