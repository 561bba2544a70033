"""docs/capabilities.md: the table of runs as a page, one section for each engine."""

from __future__ import annotations

from pocketlm.formats.proofs import NOT_RUN, Cell, Proofs

HEAD = """# What runs where

Written by `make interop`; every cell is a run, an engine's refusal, or says that nobody ran it. The
same data lies in `formats/proofs.json`, which `plan` consults.

- **✓ 1e-05**: *proven by a run*: the mean KL in nats of the engine's log-probabilities to our own
  float32 run of the same files, 252 positions; **✓ =**: float32 logits equal bit for bit. Greedy,
  20 prompts × 32 tokens: where our two best tokens are 0.1 nats or more apart the engine chose
  ours, but for as many as a second figure counts: at most 2 % of the 640, and only where
  activations are rounded to 8 bits.
  What transformers decodes in 16 bits though float32 is asked for is rounded so on our side too,
  and a note says it.
- **≠ 1e-02**: it ran and computed otherwise: beyond the bound, or another greedy choice.
- **✗ (1)**: *refused by the engine*; its message is below the table.
- **– (1)**: *not run here*, for the reason below the table.

Bounds: transformers equal or below 1e-4, vLLM below 1e-3, llama.cpp below 5e-3, ONNX Runtime below
1e-6. A mixture of experts in llama.cpp: where rounded inputs choose other experts and move our own
run further than these, twice what they move it by, of the KL and of greedy choices.
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
    parts = [f"## {engine}", f"{heard}{what[:1].upper()}{what[1:]}."]
    apart: dict[str | None, list[str]] = {}  # rows that one reason keeps from every column
    lines = ["| row | format | grids | " + " | ".join(names) + " |"]
    lines.append("| --- " * (3 + len(names)) + "|")
    notes: dict[str, int] = {}
    for row in table.rows:
        found = [cells[row.name, name] for name in names]
        if all(cell == found[0] and cell.status == NOT_RUN for cell in found):
            apart.setdefault(found[0].message, []).append(row.name)
            continue
        marks = " | ".join(_mark(cell, notes) for cell in found)
        lines.append(
            f"| {row.name} | {row.format} | {', '.join(row.grids) or 'floats'} | {marks} |"
        )
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    for reason, left in apart.items():
        because = "" if reason is None else f" ({_plain(reason)})"
        which = "every cell" if len(left) == len(table.rows) else "; ".join(left)
        parts.append(f"Not run here{because}: {which}.")
    if notes:
        parts.append("\n".join(f"{place}. {_plain(message)}" for message, place in notes.items()))
    return "\n\n".join(parts) + "\n"


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    message = cell.message
    place = "" if message is None else f" ({notes.setdefault(message, len(notes) + 1)})"
    flips = f", {cell.wrong}" if cell.wrong else ""
    if cell.status == "proven":
        return f"✓ ={place}" if cell.bit_equal else f"✓ {cell.kl:.0e}{flips}{place}"
    if cell.status == "disagrees":
        return f"≠ {cell.kl:.0e}, {cell.wrong}{place}"
    return f"✗{place}" if cell.status == "refused" else f"–{place}"


def _plain(message: str) -> str:
    """A message that Markdown leaves alone, in one line."""
    text = " ".join(message.split())
    return "".join(f"\\{c}" if c in "*_<>|`[]" else c for c in text)
