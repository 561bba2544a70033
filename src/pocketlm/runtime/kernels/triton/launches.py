"""Which product, with which tile sizes, for how many activations: measured choices for each device.

`launches.json` is written by ``benchmarks/kernels.py --tune`` and holds, for each device name,
rows of (width of a code, shape of the weight, activations) → launch. A lookup takes the row of the
same width with the fewest activations that are not fewer than those at hand, of the nearest shape.
A device that is not in the file gets `DEFAULTS`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

FILE = Path(__file__).with_name("launches.json")
FEW_TOKENS = 16  # up to which the product for few rows alone is taken where nothing was measured


@dataclass(frozen=True)
class Launch:
    """A product and its tile sizes.

    Attributes:
        product: "decode" (decode.py) or "prefill" (prefill.py).
        units: Units that are taken in a step; fewer where groups or columns do not allow it.
        warps: Of a program.
        row_tiles: Of "decode": tiles of 16 outputs of a program.
        ahead: Of "decode": steps whose weights are under way; a power of two.
        shared: Of "decode": whether activations come through shared memory.
        x_ahead: Of "decode": whether activations are loaded a step ahead, where not shared.
        release: On Hopper: when the kernel behind it may start to load its weights.
        tokens: Of "prefill": activations of a tile.
        stages: Of "prefill": length of the ring in shared memory.
        splits: Of "prefill": parts of the columns that are summed by programs of their own.
    """

    product: Literal["decode", "prefill"]
    units: int = 1
    warps: int = 4
    row_tiles: int = 1
    ahead: int = 1
    shared: bool = False
    x_ahead: bool = False
    release: Literal["never", "start", "end"] = "start"
    tokens: int = 64
    stages: int = 4
    splits: int = 1

    def fit(self, group_size: int, columns: int, unit: int) -> Launch:
        """The same with so many units a step that steps make up groups, and a row if they must."""
        units, whole = self.units, columns if self.product == "prefill" else group_size
        while units > 1 and (group_size % (units * unit) or whole % (units * unit)):
            units //= 2
        return replace(self, units=units)


DEFAULTS = {  # activations → launch
    8: Launch("decode", units=2, warps=4),
    16: Launch("decode", units=2, warps=4),
    32: Launch("prefill", tokens=32),
    64: Launch("prefill", tokens=64),
    128: Launch("prefill", tokens=128, warps=8),
    512: Launch("prefill", tokens=256, warps=8),
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
    devices = json.loads(FILE.read_text("utf-8"))
    return {
        name: tuple(Measured(**{**row, "launch": Launch(**row["launch"])}) for row in rows)
        for name, rows in devices.items()
    }


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
    known = [row for row in measured().get(device, ()) if row.width == width]
    if not known:
        least = min((m for m in DEFAULTS if m >= activations), default=max(DEFAULTS))
        return DEFAULTS[least]
    counts = {row.activations for row in known}
    count = min((m for m in counts if m >= activations), default=max(counts))

    def distance(row: Measured) -> float:
        return abs(math.log(row.rows / rows)) + abs(math.log(row.columns / columns))

    return min((row for row in known if row.activations == count), key=distance).launch
