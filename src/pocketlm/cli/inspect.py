"""What a model is made of, as observation finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.options import Json, Revision, Source, TrustRemoteCode
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text

if TYPE_CHECKING:
    from pocketlm.models.inspect import FoldFinding, Inspection, LayoutFinding


def run(
    source: Source,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Run a block: finds groups, tries folds.")
    ] = True,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Show blocks, groups of linears, folds, sizes, and what would be left out and why.

    Example: [bold]pocketlm inspect smollm2-135m[/bold]
    """
    from pocketlm import api

    found = api.inspect(source, probe=probe, trust_remote_code=trust_remote_code, revision=revision)
    return Answer(found, lambda console: _draw(console, source, found))


def _draw(console: Console, source: str, found: Inspection) -> None:
    facts = {
        "architecture": f"{found.architecture} ({found.model_type})",
        "blocks": str(found.blocks),
        "size": f"{found.parameters:,} parameters, {bytes_text(found.bytes_stored)}, "
        f"mostly {found.dtype}",
        "context": f"{found.context:,} tokens",
        "vocabulary": f"{found.vocabulary:,} tokens, head "
        f"{'tied to the embedding' if found.tied else 'of its own'}",
    }
    if found.compressed:
        facts["size"] = facts["size"].replace("mostly", "uncompressed tensors mostly")
        facts["compressed"] = "; ".join(
            f"{count} weights: {form}" for form, count in found.compressed.items()
        )
    draw.facts(console, source, facts)
    rows = [
        (kind, share.tensors, f"{share.parameters:,}", bytes_text(share.bytes_stored))
        for kind, share in found.shares.items()
    ]
    draw.table(console, ("\nkind", "tensors>", "parameters>", "bytes>"), rows)
    for layout in found.layouts:
        _draw_layout(console, layout)
    draw.grouped(console, "\nLeft out", found.left_out)
    if found.extras:
        more = f" and {len(found.extras) - 1} more" if len(found.extras) > 1 else ""
        console.print(f"Carried over unchanged: {found.extras[0]}{more}", markup=False)


def _draw_layout(console: Console, layout: LayoutFinding) -> None:
    console.print(
        f"\n{layout.block_class}: {len(layout.blocks)} blocks, first {layout.blocks[0]}",
        style="bold",
    )
    rows = []
    for group in layout.groups:
        shapes = [f"{name.split('.', 3)[-1]} {o}×{i}" for name, (o, i) in group.linears.items()]
        count = "" if group.count == 1 else f"{group.count} × "
        rows.append((count + ", ".join(shapes), _fold(group.fold)))
    if rows:
        draw.table(console, ("linears of one input (O×I)", "scale could move to"), rows)


def _fold(fold: FoldFinding | None) -> str:
    if fold is None:
        return "nowhere"
    error = "" if fold.error is None else f", error {fold.error:.0e}"
    if fold.accepted:
        return f"{fold.producer} ({fold.form}{error})"
    return f"refused: {fold.producer} ({fold.reason or fold.form}{error})"
