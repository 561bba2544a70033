"""Compresses embedding and head, some rows at a time: neither is ever whole in memory.

Rows are independent of each other: a scale belongs to one row's columns, and no data is used (what
reaches an embedding are ids). A chunk lies in the work directory like a block, after the blocks; a
killed run redoes at most one embedding or head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError, NumericError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, LinearStep, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.core.views import End, Rows
from pocketlm.engine.grids import scale_dtype_for
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Entry
from pocketlm.formats import format_for
from pocketlm.formats.safetensors_header import StoredTensor, read_header

CHUNK_WEIGHTS = 4 << 20  # of one chunk, in whole words of 32 rows
SHAPE = "weight_shape"  # the one stored tensor that is not cut into rows
Pieces = list[tuple[Path, StoredTensor]]  # file and place of a tensor's rows, one a chunk


@dataclass(frozen=True)
class EndTask:
    """An embedding or head that is compressed.

    Attributes:
        end: What of the model.
        name: Module path of what is written: the end's, or its head's where the two are untied.
        spec: The grid, fitted.
        first: Index of its first chunk in the journal.
    """

    end: End
    name: str
    spec: QuantSpec
    first: int

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk but the last."""
        return max(32, CHUNK_WEIGHTS // self.end.shape[1] // 32 * 32)

    @property
    def chunks(self) -> int:
        """How many chunks."""
        return -(-self.end.shape[0] // self.chunk_rows)


def end_tasks(ends: Sequence[End], grids: Mapping[str, QuantSpec], blocks: int) -> list[EndTask]:
    """What is to be compressed, in order.

    Args:
        ends: Of the model.
        grids: Module path → fitted grid, of embedding and head.
        blocks: How many blocks lie before them in the journal.
    """
    tasks: list[EndTask] = []
    for end in ends:
        for name in (end.name, end.tied_name):
            if name is not None and name in grids:
                first = tasks[-1].first + tasks[-1].chunks if tasks else blocks
                tasks.append(EndTask(end, name, grids[name], first))
    return tasks


def quantized_rows(
    weight_OI: Tensor, name: str, spec: QuantSpec, dtype: torch.dtype, steps: Sequence[LinearStep]
) -> Packed:
    """Some rows of an embedding or head on a grid.

    Args:
        weight_OI: The rows, float32.
        name: Module path, for messages.
        spec: The grid.
        dtype: Of the weight in the checkpoint.
        steps: Linear steps that need no data.
    """
    state = LinearState(name, weight_OI, spec, scale_dtype_for(dtype))
    stats = Statistics(Hessian(weight_OI.shape[1], weight_OI.device))
    for step in steps:
        state = step.compress(state, stats)
    if not isinstance(state.current, PackedInt | PackedFloat):
        raise ConfigError("no step quantizes it.", where=name)
    return state.current


def compress_end(
    task: EndTask,
    rows: Rows,
    dtype: torch.dtype,
    format_name: str,
    steps: Sequence[LinearStep],
    journal: Journal,
    device: torch.device,
    notes: Sequence[str],
) -> None:
    """Compresses one of them into the journal; does nothing where an earlier attempt has.

    Args:
        task: Which.
        rows: Gives its rows.
        dtype: Of the weight in the checkpoint.
        format_name: The format it is written in.
        steps: What compresses it.
        journal: Where chunks are kept.
        device: Where it is computed.
        notes: For the ledger.

    Raises:
        NumericError: If the weight is not finite.
    """
    last = task.first + task.chunks - 1
    if journal.has_block(last):
        return
    writer, lost, whole, bits = format_for(format_name), 0.0, 0.0, 0
    for index in range(task.chunks):
        start = index * task.chunk_rows
        weight_OI = rows(start, min(start + task.chunk_rows, task.end.shape[0])).to(device).float()
        packed = quantized_rows(weight_OI, task.name, task.spec, dtype, steps)
        whole += float(weight_OI.square().sum())
        lost += float((weight_OI - packed.dequantize()).square().sum())
        bits += packed.stored_bits
        stored = writer.encode(f"{task.name}.weight", packed.to("cpu"))
        entries: dict[str, Entry] = {}
        if task.first + index == last:
            error = lost / max(whole, torch.finfo(torch.float32).tiny)
            if not error < float("inf"):
                raise NumericError("its rounding error is not finite.", where=task.name)
            twin = task.end.tensor if task.name != task.end.name else None
            entries[f"{task.name}.weight"] = Entry(
                action="quantized",
                reason=" → ".join(type(step).__name__.lower() for step in steps),
                shape=task.end.shape,
                bits=bits,
                spec=task.spec,
                error=round(error, 9),
                notes=list(notes),
                outputs=list(stored),
                end="embedding" if task.end.embeds and twin is None else "head",
                copy_of=twin,
            )
        journal.write_block(task.first + index, stored, entries)


def stored_end(task: EndTask, journal: Journal) -> tuple[dict[str, Entry], dict[str, Pieces]]:
    """The account of a finished one, and where its tensors lie, by whole names."""
    found: dict[str, Pieces] = {}
    entries: dict[str, Entry] = {}
    for index in range(task.first, task.first + task.chunks):
        path, accounts = journal.block_files(index)
        entries.update(accounts)
        for name, place in read_header(path).items():
            found.setdefault(name, []).append((path, place))
    return entries, found
