"""The shapes of every answer: named facts, a table, grouped reasons, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def printable(text: str) -> str:
    """A model's text without control characters: some of them would steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def facts(console: Console, title: str, pairs: Mapping[str, str]) -> None:
    """Draws ``name  value`` lines.

    Args:
        console: Where to.
        title: Of the whole; none is drawn where it is empty.
        pairs: Name → value, in words.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(escape(name), escape(value))
    if title:
        console.print(f"[bold]{escape(title)}[/bold]")
    console.print(grid)


def table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    title: str | None = None,
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
        drawn.add_column(heading.rstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    console.print(drawn)


def warnings(console: Console, lines: Iterable[str]) -> None:
    """Draws one line for each thing a user must be told."""
    for line in lines:
        console.print(f"[yellow]![/yellow] {escape(line)}", soft_wrap=True)


def grouped(console: Console, title: str, reasons: Mapping[str, str]) -> None:
    """Draws reasons with how many names share each: layers of a model mostly do.

    Args:
        console: Where to.
        title: Above them; nothing is drawn where there is no reason.
        reasons: Name → why.
    """
    if not reasons:
        return
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    console.print(f"[bold]{escape(title)}[/bold]")
    for reason, affected in names.items():
        more = "" if len(affected) == 1 else f" and {len(affected) - 1} more"
        console.print(f"  {escape(affected[0])}{more}: {escape(reason)}", soft_wrap=True)
