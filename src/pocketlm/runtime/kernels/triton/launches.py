"""Which product, with which tile sizes, for how many activations: measured choices for each device.

`launches.json` is written by ``benchmarks/kernels.py --tune``. It holds, for each device name, rows
of (width of a code, shape of the weight, activations) → launch, or the name of a device whose rows
serve as well. A lookup takes the rows with the fewest activations that are not fewer than those at
hand, of the same width where there are any, else of 4 bits, and of these the nearest shape.
A device that is not in the file gets `DEFAULTS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("launches.json")


@dataclass(frozen=True)
class Launch:
    """A product and its tile sizes.

    Attributes:
        product: "decode" (decode.py), "prefill" (prefill.py) or "wide" (wide.py; where a weight
            is small or does not suit that, "prefill" takes its tiles).
        columns: That a warp ("decode") or a program takes in a step; fewer where groups want it.
        warps: Of a program.
        row_tiles: Of "decode": tiles of 16 outputs of a program.
        ahead: Of "decode": steps whose weights are under way; a power of two.
        shared: Of "decode": whether activations come through shared memory.
        early: Of "decode", on Hopper: whether it starts before the kernel before it has ended.
        resident: Of "decode": programs for each multiprocessor, which take tiles in turn; 0: one
            program for each set of tiles.
        tokens: Of "prefill" and "wide": activations of a tile.
        stages: Of the same: length of the ring in shared memory.
        splits: Of "prefill": parts of the columns that are summed by programs of their own.
    """

    product: Literal["decode", "prefill", "wide"]
    columns: int = 128
    warps: int = 4
    row_tiles: int = 1
    ahead: int = 1
    shared: bool = False
    early: bool = True
    resident: int = 0
    tokens: int = 64
    stages: int = 4
    splits: int = 1

    def units(self, unit: int, group_size: int, columns: int) -> int:
        """How many units of `unit` columns a step takes: whole steps make up a group, and a row."""
        count, whole = max(1, self.columns // unit), 0 if self.product == "decode" else columns
        while count > 1 and (group_size % (count * unit) or whole % (count * unit)):
            count //= 2
        return count


DEFAULTS = {  # activations → launch
    4: Launch("decode", ahead=2),
    8: Launch("decode", shared=True),
    16: Launch("decode", row_tiles=2, shared=True),
    32: Launch("prefill", tokens=32),
    64: Launch("prefill", tokens=64),
    128: Launch("prefill", tokens=128, warps=8),
    256: Launch("prefill", tokens=256, warps=8, columns=64),
    1024: Launch("wide", tokens=256, warps=8, columns=64, stages=5),
}


@dataclass(frozen=True)
class Measured:
    """A row of the file.

    Attributes:
        width: Bits that a code takes.
        rows: O of the weight.
        columns: I of the weight.
        activations: M.
        launch: The fastest.
        seconds: What it took.
    """

    width: int
    rows: int
    columns: int
    activations: int
    launch: Launch
    seconds: float = field(compare=False)


@lru_cache(maxsize=1)
def measured() -> dict[str, tuple[Measured, ...]]:
    """The file: device name → rows."""
    if not FILE.exists():
        return {}
    devices: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    own = {name: rows for name, rows in devices.items() if not isinstance(rows, str)}
    parsed = {name: tuple(map(_row, rows)) for name, rows in own.items()}
    return {name: parsed[rows if isinstance(rows, str) else name] for name, rows in devices.items()}


def _row(data: dict[str, Any]) -> Measured:
    return Measured(**{**data, "launch": Launch(**data["launch"])})


@lru_cache(maxsize=4096)
def launch_for(device: str, width: int, rows: int, columns: int, activations: int) -> Launch:
    """The launch for a weight of `rows` x `columns` and so many activations.

    Args:
        device: As CUDA names it.
        width: Bits that a code takes: 2, 3, 4 or 8.
        rows: O.
        columns: I.
        activations: M.

    Returns:
        The measured one of the nearest case; of a device that was not measured, the default.
    """
    known = measured().get(device, ())
    if not known:
        return DEFAULTS[_least(tuple(DEFAULTS), activations)]
    enough = [row for row in known if row.activations >= activations]
    fitting = [row for row in enough if row.width == width] or [
        row for row in known if row.width == 4
    ]
    count = _least([row.activations for row in fitting], activations)

    def distance(row: Measured) -> float:
        return abs(math.log(row.rows / rows)) + abs(math.log(row.columns / columns))

    return min((row for row in fitting if row.activations == count), key=distance).launch


def _least(counts: Sequence[int], activations: int) -> int:
    """The least count that suffices; the greatest where none does."""
    return min((count for count in counts if count >= activations), default=max(counts))
