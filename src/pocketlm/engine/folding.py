"""The fold pass over a block: scales of every group whose producer takes one, decided at once.

All statistics are of the original block, before anything is moved. A scale leaves the function of
the block alone, so the statistics stay true of the folded block but for the scale itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.state import FoldStep, LinearState, Note, Statistics
from pocketlm.core.stats import Stat
from pocketlm.core.views import BlockView, Group
from pocketlm.engine.batches import Batches
from pocketlm.engine.grids import scale_dtype_for
from pocketlm.engine.health import InputWatch


def fold_groups(
    block: BlockView,
    steps: Sequence[FoldStep],
    specs: Mapping[str, QuantSpec | None],
    batches: Batches | None,
    device: torch.device,
    kept_dtype: torch.dtype | None,
    activations: Mapping[str, ActivationSpec] | None = None,
) -> tuple[dict[str, Tensor], dict[str, tuple[Note, ...]]]:
    """Decides and carries out the folds of a block.

    Args:
        block: The loaded block, as the checkpoint has it.
        steps: What decides, in order; a later one sees the weights that an earlier one scaled.
        specs: Grids by module path.
        batches: The calibration data; None where no step needs any.
        device: Where statistics are gathered.
        kept_dtype: In which tensors beside the linears are stored; None: their own.
        activations: Module path → how its inputs will be rounded, of the linears whose are.

    Returns:
        Changed tensors by checkpoint name, and what is to be told of linears left alone.
    """
    tensors: dict[str, Tensor] = {}
    notes: dict[str, tuple[Note, ...]] = {}
    for step in steps:
        foldable: list[Group] = []
        for group in block.probe_folds():
            reason = _why_not(group, specs)
            if reason is None:
                foldable.append(group)
            else:
                note = Note("fold", f"no scale was folded into its input: {reason}.")
                notes.update(dict.fromkeys(group.linears, (note,)))
        gathered = _gather(foldable, block, step, batches, device)
        for group in foldable:
            states = [_state(block, name, specs[name], activations or {}) for name in group.linears]
            scale_I = step.scale(states, gathered[group.index])
            if scale_I is not None:
                tensors.update(block.fold(group, scale_I, kept_dtype).tensors)
                continue
            text = f"{type(step).__name__.lower()} folded no scale into its input: none helps."
            for name in group.linears:
                notes[name] = (*notes.get(name, ()), Note("fold", text))
    return tensors, notes


def _state(
    block: BlockView, name: str, spec: QuantSpec | None, activations: Mapping[str, ActivationSpec]
) -> LinearState:
    view = block.linears[name]
    scale_dtype = scale_dtype_for(view.dtype)
    return LinearState(name, view.weight_OI(), spec, scale_dtype, inputs=activations.get(name))


def _why_not(group: Group, specs: Mapping[str, QuantSpec | None]) -> str | None:
    """Why a group takes no fold; None where it does."""
    fold = group.fold
    if fold is None:
        return "nothing feeds these linears alone"
    if not fold.accepted:
        return f"{fold.producer}: {fold.reason}"
    kept = [name for name in group.linears if name not in specs]
    if kept:
        return f"{kept[0]} reads the same value and is not compressed"
    if fold.form == "linear" and fold.producer not in specs:
        return f"{fold.producer} is not compressed"
    return None


def _gather(
    groups: Sequence[Group],
    block: BlockView,
    step: FoldStep,
    batches: Batches | None,
    device: torch.device,
) -> dict[int, Statistics]:
    """Statistics of the block as it is, of all these groups in one run of every batch."""
    stats: dict[int, list[Stat]] = {}
    watches: dict[int, InputWatch] = {}
    for group in groups:
        columns = block.linears[group.linears[0]].in_features
        stats[group.index] = [kind(columns, device) for kind in step.needs]
        watches[group.index] = InputWatch(columns, device)
    if batches is not None and step.needs:
        for batch, call in enumerate(batches.calls):
            run = block.start(batches.store.get(batch).to(device), call)
            while (pause := run.advance()) is not None:
                for stat in stats.get(pause.group, ()):
                    stat.add(pause.inputs)
                if pause.group in watches:
                    watches[pause.group].add(pause.inputs)
    for group in groups:
        watches[group.index].require_finite(group.linears[0])
    return {index: Statistics(*found) for index, found in stats.items()}
