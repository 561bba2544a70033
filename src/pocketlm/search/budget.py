"""A budget in bits or bytes, and what of it is spent before anything is chosen.

Bits: the average over the compressed linears, codes, scales and zero points counted.
Bytes: of the weight files, with all kept tensors, padding, headers and the index of shards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pocketlm.core.errors import BudgetError, ConfigError
from pocketlm.core.views import ModelView
from pocketlm.engine.grids import Grids, linear_bits
from pocketlm.engine.plan import stored_sizes
from pocketlm.formats import format_for
from pocketlm.formats.shards import MAX_SHARD_BYTES
from pocketlm.search.ends import kept_bytes
from pocketlm.search.units import Unit, file_bytes

HEADER_BYTES = 112  # of a tensor's line in a header beside its name, at most
INDEX_BYTES = 56  # of its line in the index beside its name, at most
FILE_BYTES = 64  # of a file's metadata, length and alignment, at most


@dataclass(frozen=True)
class Budget:
    """What a user allows: one of the two.

    Attributes:
        bits: Average real bits of the compressed linears.
        file_bytes: Of the weight files.

    Raises:
        ConfigError: If both or neither are given, or it is not positive.
    """

    bits: float | None = None
    file_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.file_bytes) if value is not None]
        if len(given) != 1:
            raise ConfigError(
                "a budget is an average of bits or a size in bytes.",
                where="--bits and --size",
                remedy="Give one of them.",
            )
        if not 0 < given[0] < math.inf:
            raise ConfigError(f"{given[0]} is no budget.", where="--bits or --size")


@dataclass(frozen=True)
class Spent:
    """What is spent outside the units that are free to choose.

    Attributes:
        weights: Of all compressed linears, chosen or not.
        bits: Of compressed linears that an override names.
        file_bytes: Of everything but the units: kept tensors, such linears, headers.
        kept_bytes: Of the tensors that keep their precision whatever is chosen.
    """

    weights: int
    bits: int
    file_bytes: int
    kept_bytes: int


def spent(
    model: ModelView, grids: Grids, units: Sequence[Unit], dtype: torch.dtype | None
) -> Spent:
    """What no choice changes.

    Args:
        model: The source.
        grids: Any grids that the recipe could have: they say what is compressed at all.
        units: What is free to choose.
        dtype: Of the tensors that are kept; None: as in the source.
    """
    shapes, free = model.linear_shapes(), {name for unit in units for name in unit.linears}
    fixed = {name: spec for name, spec in grids.quantized.items() if name not in free}
    sizes = stored_sizes(model, grids, dtype)
    chosen = [unit.end for unit in units if unit.end is not None]
    kept = sizes["output"] - sizes["blocks"] - sizes["ends"]
    kept -= sum(kept_bytes(model, end, dtype) for end in chosen)
    written = kept + sizes["ends"] + file_bytes(model, fixed, grids.format_name, grids.inputs)
    largest = sum(unit.candidates[-1].file_bytes for unit in units)
    return Spent(
        weights=sum(math.prod(shapes[name]) for name in grids.quantized),
        bits=sum(
            linear_bits(spec, shapes[name], grids.inputs.get(name)) for name, spec in fixed.items()
        ),
        file_bytes=written + _overhead(model, grids, written + largest),
        kept_bytes=kept,
    )


def _overhead(model: ModelView, grids: Grids, bytes_most: int) -> int:
    """Bytes of headers and index, at most: names and places differ little between choices."""
    section, names = format_for(grids.format_name), []
    for name in model.source.infos():
        if name in model.repeated:
            continue
        module = name.removesuffix(".weight")
        spec, inputs = grids.quantized.get(module), grids.inputs.get(module)
        names += [name] if spec is None else section.names(name, spec, inputs)
    lengths = sum(len(json.dumps(name, ensure_ascii=False).encode()) for name in names)
    shards = 1 + bytes_most // (MAX_SHARD_BYTES // 2)
    header = lengths + len(names) * HEADER_BYTES + shards * FILE_BYTES
    index = lengths + len(names) * INDEX_BYTES + FILE_BYTES if bytes_most > MAX_SHARD_BYTES else 0
    return header + index


def room(budget: Budget, units: Sequence[Unit], before: Spent) -> tuple[list[list[int]], int]:
    """The prices of all candidates, and what is left for them.

    Args:
        budget: The user's.
        units: What is free to choose.
        before: What is spent already.

    Returns:
        Prices by unit and candidate, and the sum they may reach, in whole bits or bytes.

    Raises:
        BudgetError: If the cheapest choice is over the budget; says what it comes to.
    """
    if budget.bits is not None:
        prices = [[c.bits for c in unit.candidates] for unit in units]
        least = before.bits + sum(min(row) for row in prices)
        # A hair for a decimal such as 3.3 that binary cannot hold.
        allowed = math.floor(budget.bits * before.weights * (1 + 1e-12))
        if least > allowed:
            raise BudgetError(
                f"an average of {budget.bits:g} bits is below the smallest possible, "
                f"{math.ceil(1000 * least / before.weights) / 1000:.3f}: scales count too.",
                where="--bits",
                remedy="Give more bits, or larger groups with --group-size.",
            )
        return prices, allowed - before.bits
    assert budget.file_bytes is not None
    prices = [[c.file_bytes for c in unit.candidates] for unit in units]
    least = before.file_bytes + sum(min(row) for row in prices)
    if least > budget.file_bytes:
        raise BudgetError(
            f"{budget.file_bytes:,} bytes are below the smallest possible, {least:,}, of which "
            f"{before.kept_bytes:,} are tensors that keep their precision.",
            where="--size",
            remedy="Give more bytes, larger groups with --group-size, or a smaller --dtype for "
            "what is kept.",
        )
    return prices, budget.file_bytes - before.file_bytes
