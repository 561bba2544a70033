"""Proof that an artifact is what its ledger says."""

from __future__ import annotations

from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.options import Artifact, Json
from pocketlm.cli.output import Answer
from pocketlm.core.errors import ArtifactError


def run(path: Artifact, json: Json = False) -> Answer:
    """Reload the written files by the target engine's rules and check all of them.

    Exit code 2 if a check fails.

    Example: [bold]pocketlm verify out[/bold]
    """
    from pocketlm import api

    found = api.verify(path)

    def show(console: Console) -> None:
        draw.facts(console, str(path), found.model_dump())

    return Answer(found, show)
