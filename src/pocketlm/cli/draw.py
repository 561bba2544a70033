"""Two shapes for every answer: named facts, and a table. Units come from the field names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocketlm.cli.units import show_bytes, show_count, show_seconds


def value_text(name: str, value: Any) -> str:
    """A field's value in words, its unit taken from the field's name.

    Args:
        name: Such as ``output_bytes`` or ``seconds``.
        value: A number, a string or a list of them.

    Returns:
        Such as ``1.2 GiB``; ``–`` for None.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name:
        return show_bytes(value)
    if isinstance(value, int | float) and "seconds" in name:
        return show_seconds(value)
    if isinstance(value, int) and name in ("parameters", "tokens"):
        return show_count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(part) for part in value)
    return str(value)


def facts(console: Console, title: str, pairs: Mapping[str, Any]) -> None:
    """Draws ``name  value`` lines.

    Args:
        console: Where to.
        title: Of the whole.
        pairs: Field name → value; the names lose their unit and underscores.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        grid.add_row(label, escape(value_text(name, value)))
    console.print(f"[bold]{escape(title)}[/bold]")
    console.print(grid)


def table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None
) -> None:
    """Draws a table; all but the first column stand to the right where they hold numbers.

    Args:
        console: Where to.
        columns: Headings; a heading that ends in ``>`` is of numbers.
        rows: Cells, already in words.
        title: Above it.
    """
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        right = heading.endswith(">")
        drawn.add_column(
            heading.rstrip(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    console.print(drawn)


def warnings(console: Console, lines: Iterable[str]) -> None:
    """Draws one line for each thing a user must be told."""
    for line in lines:
        console.print(f"[yellow]![/yellow] {escape(line)}")
