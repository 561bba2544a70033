"""Compresses one loaded block: a recipe's steps in passes over it, then what is to be written.

fold pass:    statistics of the whole original block, then scales moved between neighbours
linear pass:  group by group: statistics, each linear through all steps of the pass, on with the
              weights as decoded from what will be written
block pass:   one step on all linears against the block's output
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.state import (
    BlockStep,
    FoldStep,
    LinearState,
    LinearStep,
    Note,
    Statistics,
    Step,
)
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.core.views import BlockView, Group, LinearView
from pocketlm.engine.batches import Batches, Sweep
from pocketlm.engine.folding import fold_groups
from pocketlm.engine.grids import scale_dtype_for
from pocketlm.engine.health import InputHealth, InputWatch
from pocketlm.engine.inputs import Inputs
from pocketlm.engine.task import Task

FEW_TOKENS = Note("few_tokens", "fewer calibration tokens reached it than it has inputs.")


@dataclass(frozen=True)
class Compressed:
    """One linear after its last step.

    Attributes:
        view: Where it came from.
        packed: What is written.
        spec: Its grid.
        error: Relative squared output error of the weight on the calibration inputs.
        notes: Of every fallback.
        inputs: What reached it; None without calibration data.
        quantizer: What its inputs are rounded with; None: nothing.
    """

    view: LinearView
    packed: Packed
    spec: QuantSpec
    error: float
    notes: tuple[Note, ...]
    inputs: InputHealth | None
    quantizer: InputQuantizer | None = None


@dataclass(frozen=True)
class BlockResult:
    """A block after its last step.

    Attributes:
        linears: What was compressed, in order of execution.
        folded: Other tensors that folds have changed, by checkpoint name, as they are stored now.
    """

    linears: list[Compressed]
    folded: dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """Consecutive steps of one kind; a block step makes a pass of its own."""

    kind: str
    steps: tuple[Any, ...]


def passes(steps: Iterable[Step]) -> list[Pass]:
    """The passes over a block that a recipe's steps make.

    Raises:
        ConfigError: If a fold comes after a step that quantizes, or nothing quantizes.
    """
    found: list[Pass] = []
    for kind, run in groupby(steps, key=lambda step: step.kind):
        together = tuple(run)
        found += [Pass(kind, (s,)) for s in together] if kind == "block" else [Pass(kind, together)]
    late = [p for p in found[1:] if p.kind == "fold"]
    if late:
        raise ConfigError(
            f"{type(late[0].steps[0]).__name__} moves scales after a step that quantizes.",
            where="recipe",
            remedy="Put folds such as awq or smoothquant first.",
        )
    if found[-1].kind == "fold":
        raise ConfigError(
            f"{type(found[-1].steps[-1]).__name__} is the last step, and it quantizes nothing.",
            where="recipe",
            remedy="Add a quantizing step such as rtn or gptq after it.",
        )
    return found


def compress_block(
    block: BlockView,
    steps: Sequence[Step],
    specs: Mapping[str, QuantSpec],
    batches: Batches | None,
    device: torch.device,
    *,
    activations: Mapping[str, ActivationSpec] | None = None,
    kept_dtype: torch.dtype | None = None,
    seed: int = 0,
    report: Callable[[float, float | None], None] = lambda share, loss: None,
) -> BlockResult:
    """Compresses the linears of a block that have a grid; their weights in the block follow.

    Args:
        block: The loaded block; its weights are replaced by what is returned.
        steps: What is done.
        specs: Grids by module path; linears without one are kept.
        batches: The calibration data; None where no step needs any.
        device: Where statistics are gathered.
        activations: Module path → how its inputs are rounded, of the linears whose are.
        kept_dtype: In which tensors beside the linears are stored; None: their own.
        seed: Of block steps.
        report: Told the share of the work that is done, 0 to 1, and a step's loss if it has one.

    Returns:
        What is to be written.
    """
    folded: dict[str, Tensor] = {}
    notes: dict[str, tuple[Note, ...]] = {}
    results: dict[str, Compressed] = {}
    todo = passes(steps)
    if todo[0].kind == "fold":
        fold_steps: tuple[FoldStep, ...] = todo[0].steps
        folded, notes = fold_groups(
            block, fold_steps, specs, batches, device, kept_dtype, activations
        )
    inputs = Inputs(block, activations or {}, batches, device)
    for name, note in inputs.notes.items():
        notes[name] = (*notes.get(name, ()), note)
    for place, one in enumerate(todo):
        tell = _within(report, place, len(todo))
        if one.kind == "linear":
            sweep = None if batches is None else batches.sweep()
            results = _linear_pass(
                block, one.steps, specs, sweep, inputs, device, results, notes, tell
            )
            if sweep is not None and one is todo[-1]:
                sweep.finish()
            del sweep  # the next pass starts from the block's inputs, and with free memory
        elif one.kind == "block":
            assert batches is not None
            inputs.set_all()
            states = {
                view.name: _state(view, specs, inputs, results, notes, shared)
                for views in _chosen(block, specs)
                for shared in (shared_absmax(views, specs),)
                for view in views
            }
            task = Task(block, states, batches, device, seed, tell)
            step: BlockStep = one.steps[0]
            after = step.compress(task)
            results = {
                name: _finish(block.linears[name], after[name], inputs, None, _seen(results, name))
                for name in states
            }
    if batches is not None and todo[-1].kind != "linear":  # a sweep has run them itself
        for batch, call in enumerate(batches.calls):
            batches.store.put(batch, block.forward(batches.store.get(batch).to(device), call))
    return BlockResult(list(results.values()), folded)


def _within(
    report: Callable[[float, float | None], None], place: int, total: int
) -> Callable[[int, int, float | None], None]:
    """Tells of one pass as a part of all."""
    return lambda done, steps, loss=None: report((place + done / steps) / total, loss)


def _chosen(block: BlockView, specs: Mapping[str, QuantSpec]) -> list[list[LinearView]]:
    """The linears that have a grid, by group."""
    return [
        [block.linears[name] for name in group.linears if name in specs] for group in block.groups
    ]


def _linear_pass(
    block: BlockView,
    steps: Sequence[LinearStep],
    specs: Mapping[str, QuantSpec],
    sweep: Sweep | None,
    inputs: Inputs,
    device: torch.device,
    earlier: Mapping[str, Compressed],
    notes: Mapping[str, tuple[Note, ...]],
    tell: Callable[[int, int, float | None], None],
) -> dict[str, Compressed]:
    total = sum(map(len, _chosen(block, specs)))
    results: dict[str, Compressed] = {}

    def exchange(original: bool) -> None:
        for name, done in {**earlier, **results}.items():
            weight_OI = done.view.weight_OI() if original else done.packed.dequantize().to(device)
            done.view.set_weight_OI(weight_OI)
            inputs.set(name, on=not original)

    for group in block.groups:
        chosen = [block.linears[name] for name in group.linears if name in specs]
        if not chosen:
            continue
        stats, seen = _gather(group, chosen[0], steps, sweep, inputs, exchange, device)
        shared = shared_absmax(chosen, specs)
        for view in chosen:
            state = _state(view, specs, inputs, earlier, notes, shared)
            if seen is not None and seen.few and FEW_TOKENS not in state.notes:
                state = replace(state, notes=(*state.notes, FEW_TOKENS))
            for step in steps:
                state = step.compress(state, stats)
            results[view.name] = _finish(view, state, inputs, stats.get(Hessian), seen)
            tell(len(results), total, None)
    return results


def _gather(
    group: Group,
    view: LinearView,
    steps: Sequence[LinearStep],
    sweep: Sweep | None,
    inputs: Inputs,
    exchange: Callable[[bool], None],
    device: torch.device,
) -> tuple[Statistics, InputHealth | None]:
    kinds = dict.fromkeys(kind for step in steps for kind in step.needs)
    stats: list[Stat] = [kind(view.in_features, device) for kind in kinds]
    if sweep is None or not stats:
        return Statistics(*stats), None
    watch = InputWatch(view.in_features, device)

    def add(x_TI: Tensor, original_TI: Tensor | None) -> None:
        for stat in stats:
            if not stat.paired or original_TI is not None:
                stat.add(x_TI, original_TI)

    rounded = inputs.rounded(add, view.name)

    def take(x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        watch.add(x_TI)  # what reaches the linear, before it is rounded
        rounded(x_TI, original_TI)

    if not any(stat.paired for stat in stats):
        sweep.inputs(group.index, take)
    else:
        sweep.pairs(group.index, take, exchange)
    watch.require_finite(group.linears[0])
    gathered = Statistics(*stats)
    return gathered, watch.health(gathered.get(Hessian))


def shared_absmax(views: Sequence[LinearView], specs: Mapping[str, QuantSpec]) -> float | None:
    """The largest weight of linears that share a constant of the tensor (NVFP4), if any do."""
    sharing = [view for view in views if specs[view.name].scale == "e4m3"]
    return max((float(view.weight_OI().abs().amax()) for view in sharing), default=None)


def _state(
    view: LinearView,
    specs: Mapping[str, QuantSpec],
    inputs: Inputs,
    earlier: Mapping[str, Compressed],
    notes: Mapping[str, tuple[Note, ...]],
    shared: float | None,
) -> LinearState:
    """A linear before a pass: its original weight after folds, and what earlier passes made."""
    quantizer = inputs.of(view.name)
    state = LinearState(
        view.name,
        view.weight_OI(),
        specs[view.name],
        scale_dtype_for(view.dtype),
        notes=notes.get(view.name, ()),
        shared_absmax=shared,
        inputs=None if quantizer is None else quantizer.spec,
    )
    done = earlier.get(view.name)
    if done is None:
        return state
    current = done.packed.to(state.reference_OI.device)
    return replace(state, current=current, notes=done.notes)


def _seen(results: Mapping[str, Compressed], name: str) -> InputHealth | None:
    return results[name].inputs if name in results else None


def _finish(
    view: LinearView,
    state: LinearState,
    inputs: Inputs,
    hessian: Hessian | None,
    seen: InputHealth | None,
) -> Compressed:
    """What a pass leaves of a linear; the block goes on with it as it will be executed."""
    packed = state.current
    if not isinstance(packed, PackedInt | PackedFloat):
        raise UnsupportedLayer(
            "the recipe's last step left no quantized weight.",
            where=view.name,
            remedy="End the recipe with a quantizing step such as gptq or rtn.",
        )
    decoded_OI = packed.dequantize()
    # Steps may have moved what they approximate: the error is told against the original.
    error = relative_error(
        view.weight_OI(), decoded_OI, None if hessian is None else hessian.matrix_II()
    )
    view.set_weight_OI(decoded_OI)
    inputs.set(view.name, on=True)
    rounding = inputs.of(view.name)
    on_cpu = packed.to("cpu")
    return Compressed(view, on_cpu, state.spec, error, state.notes, seen, rounding)
