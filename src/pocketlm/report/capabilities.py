"""docs/capabilities.md: the table of runs as a page, one section for each engine."""

from __future__ import annotations

from pocketlm.formats.proofs import Cell, Proofs

HEAD = """# What runs where

Written by `make interop`; every cell is a run, an engine's refusal, or says that nobody ran it. The
same data lies in `formats/proofs.json`, which `plan` consults.

- **✓ 1e-05**: *proven by a run*: the mean KL in nats of the engine's log-probabilities to our own
  float32 run of the same files, 252 positions; **✓ =**: float32 logits equal bit for bit. Greedy,
  20 prompts × 32 tokens: where our two best tokens are 0.1 nats or more apart the engine chose
  ours, but for as many as a second figure counts: at most 2 % of the 640, and only where
  activations are rounded to 8 bits.
- **≠ 1e-02**: it ran and computed otherwise: beyond the bound, or another greedy choice.
- **✗ ¹**: *refused by the engine*; its message is below the table.
- **–**: *not run here*.

Bounds: transformers equal or below 1e-4, vLLM below 1e-3, llama.cpp below 5e-3.
"""


def page(table: Proofs) -> str:
    """The page, as Markdown."""
    parts = [HEAD, *(_section(table, engine) for engine in table.engines)]
    return "\n".join(parts)


def _section(table: Proofs, engine: str) -> str:
    names = list(table.architectures)
    cells = {
        (row.name, name): table.cell(row.name, engine, name) for row in table.rows for name in names
    }
    versions = sorted({cell.version for cell in cells.values() if cell.version})
    dates = sorted({cell.date for cell in cells.values() if cell.date})
    heard = (
        f"{', '.join(versions)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        if dates
        else ""
    )
    what = table.engines[engine]
    lines = [f"## {engine}", "", f"{heard}{what[:1].upper()}{what[1:]}.", ""]
    rows = [row for row in table.rows if any(cells[row.name, n] != Cell() for n in names)]
    if not rows:
        return "\n".join([*lines, "Not run here: every cell.", ""])
    notes: dict[str, int] = {}
    lines.append("| row | format | grids | " + " | ".join(names) + " |")
    lines.append("| --- " * (3 + len(names)) + "|")
    for row in rows:
        marks = [_mark(cells[row.name, name], notes) for name in names]
        grids = ", ".join(row.grids) or "floats"
        lines.append(f"| {row.name} | {row.format} | {grids} | " + " | ".join(marks) + " |")
    left = [row.name for row in table.rows if row not in rows]
    if left:
        lines += ["", "Not run here at all: " + "; ".join(left) + "."]
    lines += ["", *(f"{place}. {_plain(message)}" for message, place in notes.items()), ""]
    return "\n".join(lines)


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    if cell.status == "proven":
        flips = f", {cell.wrong}" if cell.wrong else ""
        return "✓ =" if cell.bit_equal else f"✓ {cell.kl:.0e}{flips}"
    if cell.status == "disagrees":
        return f"≠ {cell.kl:.0e}, {cell.wrong}"
    message = cell.message
    place = "" if message is None else f" {notes.setdefault(message, len(notes) + 1)}"
    return f"✗{place}" if cell.status == "refused" else f"–{place}"


def _plain(message: str) -> str:
    """A message that Markdown leaves alone, in one line."""
    text = " ".join(message.split())
    return "".join(f"\\{c}" if c in "*_<>|`[]" else c for c in text)
