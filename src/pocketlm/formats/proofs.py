"""What real engines made of what is written here: a table of runs, as data.

`proofs.json` is written by ``make interop`` and never by hand. A cell is one model in one engine:
*proven* (it ran, and computed what we compute), *disagrees* (it ran, and did not), *refused* (the
engine's message is kept) or *not run here*. `capabilities.json` beside it says what is known of an
engine's rules; this says what was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import Field

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec, Strict

FILE = "proofs.json"
NOT_RUN = "not run here"

Status = Literal["proven", "disagrees", "refused", "not run here"]


class Cell(Strict):
    """One model in one engine.

    Attributes:
        status: What came of it.
        kl: KL(ours ‖ theirs) in nats, mean over positions.
        kl_largest: At one position.
        limit: Of `kl`, where it is not the engine's: of a mixture whose experts are chosen by
            rounded inputs.
        bit_equal: Whether float32 logits are ours bit for bit; None: not compared.
        greedy: Tokens that the engine chose.
        different: Of them, where our likeliest is another.
        wrong: Of these, where our two best are 0.1 nats or more apart.
        version: Of the engine.
        dtype: What it computed in.
        date: Of the run.
        message: Why it was refused or not run, in the engine's words or ours.
    """

    status: Status = NOT_RUN
    kl: float | None = None
    kl_largest: float | None = None
    limit: float | None = None
    bit_equal: bool | None = None
    greedy: int | None = None
    different: int | None = None
    wrong: int | None = None
    version: str | None = None
    dtype: str | None = None
    date: str | None = None
    message: str | None = None


class Row(Strict):
    """A method and a number format in a format of files.

    Attributes:
        name: Unique.
        method: The recipe's steps; "none": written without data.
        format: Of the files.
        grids: What linears are stored as, by `grid_name`, or GGUF types.
    """

    name: str
    method: str
    format: str
    grids: tuple[str, ...]


class Proofs(Strict):
    """The table.

    Attributes:
        architectures: ``model_type`` of config.json, or of a real model its name, → what it was.
        engines: Engine → what it was.
        rows: In order.
        cells: ``row | engine | architecture`` → the cell.
        reasons: Engine, ``row | engine`` or architecture → why cells that are not there were not
            run; the first of them holds.
    """

    architectures: dict[str, str]
    engines: dict[str, str]
    rows: tuple[Row, ...]
    cells: dict[str, Cell] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)

    def cell(self, row: str, engine: str, architecture: str) -> Cell:
        """A cell; what is not in the table was not run, and says why."""
        found = self.cells.get(key(row, engine, architecture))
        if found is not None:
            return found
        places = (engine, f"{row} | {engine}", architecture)
        return Cell(message=next((self.reasons[p] for p in places if p in self.reasons), None))


@dataclass(frozen=True)
class Verdict:
    """What the table says of a plan.

    Attributes:
        status: "proven", "refused", "disagrees" or "not run here".
        text: A sentence.
        remedy: What to choose instead, where there is a nearest that is proven.
    """

    status: Status
    text: str
    remedy: str | None = None


@cache
def proofs() -> Proofs:
    """The table that this release was made with."""
    text = files("pocketlm.formats").joinpath(FILE).read_text("utf-8")
    return Proofs.model_validate_json(text)


def key(row: str, engine: str, architecture: str) -> str:
    """The name of a cell."""
    return f"{row} | {engine} | {architecture}"


def grid_name(spec: QuantSpec, activations: ActivationSpec | None = None) -> str:
    """A number format without its group size, such as ``INT4``, ``INT8 by row, int8-token``."""
    name = spec.name
    if spec.type == "int":
        name += ("" if spec.symmetric else " asymmetric") + (
            " by row" if spec.group_size is None else ""
        )
    return name if activations is None else f"{name}, {activations.name}"


def grid_names(
    specs: Mapping[str, QuantSpec], inputs: Mapping[str, ActivationSpec] | None = None
) -> tuple[str, ...]:
    """The different number formats of a model, sorted.

    Args:
        specs: Module path → grid.
        inputs: Module path → how its inputs are rounded.
    """
    rounded = inputs or {}
    return tuple(sorted({grid_name(spec, rounded.get(name)) for name, spec in specs.items()}))


def judge(
    target: str, format_name: str, grids: Collection[str], architecture: str
) -> Verdict | None:
    """What the runs of this release say of a model that is to be made for an engine.

    Args:
        target: A name of `capabilities.json`.
        format_name: The format it will be written in.
        grids: What its linears will be stored as.
        architecture: ``model_type`` of config.json.

    Returns:
        The verdict; None for a target that is no engine of the table.

    Raises:
        UnsupportedLayer: If the engine refused this; names the nearest that it ran. Where it
            computed otherwise the verdict says so.
    """
    table = proofs()
    if target not in table.engines:
        return None
    found = verdict(target, format_name, grids, architecture, table)
    if found.status == "refused":
        raise UnsupportedLayer(found.text, where=f"--target {target}", remedy=found.remedy)
    if target == "vllm" and found.status == NOT_RUN:  # the same engine without a GPU
        beside = verdict("vllm-cpu", format_name, grids, architecture, table)
        if beside.status == "proven":
            return Verdict(NOT_RUN, f"not run on a GPU here; {beside.text}")
    return found


def verdict(
    engine: str, format_name: str, grids: Collection[str], architecture: str, table: Proofs
) -> Verdict:
    """What runs say of a model that is to be made.

    Args:
        engine: A target, such as "vllm-cpu".
        format_name: The format it will be written in.
        grids: What its linears will be stored as.
        architecture: ``model_type`` of config.json.
        table: The runs.

    Returns:
        Refused (or disagrees) where a run of just these grids ended so, or of one of them alone;
        proven where one of just these grids did; else not run.
    """
    seen: dict[tuple[str, ...], Cell] = {}
    for row in table.rows:
        cell = table.cell(row.name, engine, architecture)
        if row.format == format_name and cell.status != NOT_RUN:
            asked = tuple(sorted(row.grids))
            if asked not in seen or cell.status == "proven":  # one method's failure is not a grid's
                seen[asked] = cell
    wanted = tuple(sorted(grids))
    parts = [wanted, *((grid,) for grid in wanted)]
    bad = next((p for p in parts if p in seen and seen[p].status in ("refused", "disagrees")), None)
    if wanted in seen and seen[wanted].status == "proven":
        cell = seen[wanted]
        figure = "bit-equal" if cell.bit_equal else f"KL {cell.kl:.0e}"
        return Verdict("proven", f"{cell.version} ran it on {cell.date}: {figure}.")
    if bad is not None:
        cell = seen[bad]
        said = (
            "refused it" if cell.status == "refused" else f"computed otherwise (KL {cell.kl:.0e})"
        )
        message = f": {cell.message}" if cell.message else "."
        text = f"{cell.version or engine} {said} for {architecture} as {', '.join(bad)}{message}"
        return Verdict(cell.status, text, _nearest(wanted, engine, architecture, table))
    alone = [p for p in parts[1:] if p in seen]
    if len(alone) == len(wanted) > 1:
        return Verdict(NOT_RUN, f"{engine} ran each of these grids alone, not together.")
    return Verdict(NOT_RUN, f"nobody ran this for {architecture} in {engine} here.")


def _nearest(wanted: Iterable[str], engine: str, architecture: str, table: Proofs) -> str | None:
    """The proven row whose bits are nearest, as advice."""
    bits = _bits(wanted)
    proven = [
        row for row in table.rows if table.cell(row.name, engine, architecture).status == "proven"
    ]
    if not proven:
        return None
    best = min(proven, key=lambda row: abs(_bits(row.grids) - bits))
    return f"Nearest that it ran: {', '.join(best.grids)} in {best.format} ({best.name})."


def _bits(grids: Iterable[str]) -> float:
    """The first figure in each name, which is its bits; 16 where there is none."""
    figures = [[c for c in grid if c.isdigit()] for grid in grids]
    counts = [int(found[0]) if found else 16 for found in figures]
    return sum(counts) / len(counts) if counts else 16.0
