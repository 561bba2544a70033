"""One look at the original model before a run: what a step wants to know of all linears at once.

The calibration text streams through the blocks as they are; statistics of a block's linears are
gathered in that one forward pass. A survey that learns then runs each block as often as it wants,
against the outputs of that pass.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketlm.calibration.store import ActivationStore, DiskStore, MemoryStore
from pocketlm.calibration.windows import Windows
from pocketlm.core.state import LinearState, Statistics, Survey
from pocketlm.core.stats import Stat
from pocketlm.core.views import BlockView, ModelView
from pocketlm.engine.events import EventLog
from pocketlm.engine.options import Job
from pocketlm.engine.plan import boundary_bytes
from pocketlm.engine.task import Task


def shares(
    model: ModelView,
    job: Job,
    chosen: Sequence[str],
    windows: Windows,
    survey: Survey,
    mean: float,
    log: EventLog,
) -> Mapping[str, float]:
    """The share of zeros that an allocation gives each linear.

    Args:
        model: The source.
        job: How batches are cut, and what activations may take.
        chosen: Module paths of the linears that are pruned.
        windows: Calibration tokens.
        survey: What to look at, and how to spread.
        mean: The share of zeros over all of them.
        log: Where progress goes.
    """
    looks: dict[str, Sequence[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        in_memory = boundary_bytes(model, job, windows.tokens_NT.numel()) <= job.activation_bytes
        memory = MemoryStore(keep_inputs=survey.sequences > 0)
        store: ActivationStore = memory if in_memory else DiskStore(Path(scratch))
        sequences = max(1, job.tokens_at_once // windows.tokens_NT.shape[1])
        calls = []
        for batch, tokens_BT in enumerate(windows.tokens_NT.split(sequences)):
            hidden_BTD, call = model.begin(tokens_BT)
            calls.append(call)
            store.put(batch, hidden_BTD)
        store.advance(0)
        total = len(model.block_paths)
        for index in range(total):
            with model.block(index) as block:
                data = _Stream(calls, store, store, job.activation_bytes)
                task, stats = _walked(block, data, set(chosen), survey, model.device, job.seed)
                looks |= survey.look(task, stats, mean)
            store.advance(index + 1)
            text = f"looking at block {index + 1} of {total}"
            log.emit("progress", text, block=index, done=index + 1, total=total)
    shapes = model.linear_shapes()
    sizes = {name: math.prod(shapes[name]) for name in looks}
    return survey.spread(looks, sizes, mean)


@dataclass(frozen=True)
class _Stream:
    """The original's activations at one block (engine.task.BlockData)."""

    calls: Sequence[Any]
    store: ActivationStore
    original: ActivationStore
    activation_bytes: int


def _walked(
    block: BlockView,
    data: _Stream,
    chosen: set[str],
    survey: Survey,
    device: torch.device,
    seed: int,
) -> tuple[Task, Mapping[str, Statistics]]:
    """The chosen linears of a block and what flows into them; all batches have gone through it."""
    stats: dict[int, list[Stat]] = {}
    for group in block.groups:
        columns = block.linears[group.linears[0]].in_features
        stats[group.index] = [kind(columns, device) for kind in survey.needs]
    for batch, call in enumerate(data.calls):
        run = block.start(data.store.get(batch).to(device), call)
        while (pause := run.advance()) is not None:
            for stat in stats[pause.group]:
                stat.add(pause.inputs)
        data.store.put(batch, run.output)
    views = {name: view for name, view in block.linears.items() if name in chosen}
    states = {
        name: LinearState(name, view.weight_OI(), None, view.dtype) for name, view in views.items()
    }
    of = {name: stats[group.index] for group in block.groups for name in group.linears}
    task = Task(block, states, data, device, seed, lambda done, total, loss: None)
    return task, {name: Statistics(*of[name]) for name in views}
