"""Compresses one loaded block: statistics group by group, steps linear by linear.

Every batch is a run that stops before each group of linears. A group's statistics are complete when
all batches stand before it; it is then compressed, and the batches go on through the weights as
decoded from what will be written. Calibration is thereby true-sequential (GPTQ, arXiv:2210.17323,
section 4) at the price of one forward pass. Runs hold activations: those that the memory budget
does not admit are dropped at each stop and run again from the block's input, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketlm.calibration.store import ActivationStore
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, LinearStep, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.core.views import BlockRun, BlockView, Group, LinearView, Pause
from pocketlm.engine.grids import scale_dtype_for


@dataclass(frozen=True)
class Compressed:
    """One linear after its last step.

    Attributes:
        view: Where it came from.
        packed: What is written.
        spec: Its grid.
        error: Relative squared output error on the calibration inputs.
        notes: (kind, sentence) of every fallback.
    """

    view: LinearView
    packed: Packed
    spec: QuantSpec
    error: float
    notes: tuple[tuple[str, str], ...]


class Batches:
    """All calibration batches on their way through one block.

    Args:
        block: The loaded block.
        calls: What each batch calls the block with.
        store: The batches' inputs, and where outputs go.
        held_runs: How many batches may stand inside the block at once.
        device: Where the block computes.
    """

    def __init__(
        self,
        block: BlockView,
        calls: Sequence[Any],
        store: ActivationStore,
        held_runs: int,
        device: torch.device,
    ) -> None:
        self._block, self._calls, self._store, self._device = block, calls, store, device
        self._held: dict[int, tuple[BlockRun, Pause | None]] = {}
        self._held_runs = held_runs

    def inputs(self, group: int, take: Callable[[Tensor], None]) -> None:
        """Hands each batch's input of a group to `take`; batches that skip the group give none."""
        for batch in range(len(self._calls)):
            run, pause = self._at(batch, group)
            if pause is not None and pause.group == group:
                take(pause.inputs)
            if batch < self._held_runs:
                self._held[batch] = (run, pause)

    def _at(self, batch: int, group: int) -> tuple[BlockRun, Pause | None]:
        run, pause = self._held.pop(batch, (None, None))
        if run is None:
            run = self._block.start(self._store.get(batch).to(self._device), self._calls[batch])
            pause = run.advance()
        while pause is not None and pause.group < group:
            pause = run.advance()
        return run, pause

    def finish(self) -> None:
        """Runs every batch to the block's end and stores its output."""
        for batch in range(len(self._calls)):
            run, pause = self._at(batch, len(self._block.groups))
            while pause is not None:
                pause = run.advance()
            self._store.put(batch, run.output)


def compress_block(
    block: BlockView,
    steps: Sequence[LinearStep],
    specs: Mapping[str, QuantSpec],
    batches: Batches | None,
    device: torch.device,
) -> list[Compressed]:
    """Compresses the linears of a block that have a grid; their weights in the block follow.

    Args:
        block: The loaded block; its weights are replaced by what is returned.
        steps: What is done to each linear.
        specs: Grids by module path; linears without one are kept.
        batches: The calibration data; None where no step needs any.
        device: Where statistics are gathered.

    Returns:
        The compressed linears in order of execution.
    """
    results: list[Compressed] = []
    for group in block.groups:
        chosen = [block.linears[name] for name in group.linears if name in specs]
        if not chosen:
            continue
        stats = _gather(group, chosen[0].in_features, steps, batches, device)
        shared = _shared_absmax(chosen, specs)
        for view in chosen:
            results.append(_compress(view, steps, specs[view.name], stats, shared))
    if batches is not None:
        batches.finish()
    return results


def _gather(
    group: Group,
    columns: int,
    steps: Sequence[LinearStep],
    batches: Batches | None,
    device: torch.device,
) -> Statistics:
    kinds = dict.fromkeys(kind for step in steps for kind in step.needs)
    stats: list[Stat] = [kind(columns, device) for kind in kinds]

    def take(x_TI: Tensor) -> None:
        for stat in stats:
            stat.add(x_TI)

    if batches is not None and stats:
        batches.inputs(group.index, take)
    return Statistics(*stats)


def _shared_absmax(views: Sequence[LinearView], specs: Mapping[str, QuantSpec]) -> float | None:
    """The largest weight of linears that share a constant of the tensor (NVFP4), if any do."""
    sharing = [view for view in views if specs[view.name].scale == "e4m3"]
    return max((float(view.weight_OI().abs().amax()) for view in sharing), default=None)


def _compress(
    view: LinearView,
    steps: Sequence[LinearStep],
    spec: QuantSpec,
    stats: Statistics,
    shared_absmax: float | None,
) -> Compressed:
    reference_OI = view.weight_OI()
    scale_dtype = scale_dtype_for(view.dtype)
    state = LinearState(view.name, reference_OI, spec, scale_dtype, shared_absmax=shared_absmax)
    for step in steps:
        state = step.compress(state, stats)
    packed = state.current
    if not isinstance(packed, PackedInt | PackedFloat):
        raise UnsupportedLayer(
            "the recipe's last step left no quantized weight.",
            where=view.name,
            remedy="End the recipe with a quantizing step such as gptq or rtn.",
        )
    decoded_OI = packed.dequantize()
    hessian = stats.get(Hessian)
    error = relative_error(
        reference_OI, decoded_OI, None if hessian is None else hessian.matrix_II()
    )
    view.set_weight_OI(decoded_OI)
    notes = tuple((n.kind, n.text) for n in state.notes)
    return Compressed(view, packed.to("cpu"), spec, error, notes)
