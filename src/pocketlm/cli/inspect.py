"""What a model is made of, as observation finds it."""

from __future__ import annotations

from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.options import Json, Revision, Source, TrustRemoteCode
from pocketlm.cli.output import Answer


def run(
    source: Source,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Show blocks, groups of linears, folds, sizes, and what would be left out and why.

    Example: [bold]pocketlm inspect smollm2-135m[/bold]
    """
    from pocketlm import api

    found = api.inspect(source, trust_remote_code=trust_remote_code, revision=revision)

    def show(console: Console) -> None:
        draw.facts(console, source, found.model_dump())

    return Answer(found, show)
