"""Compresses one loaded block: a recipe's steps in passes over it, then what is to be written.

fold pass:    statistics of the whole original block, then scales moved between neighbours
linear pass:  group by group: statistics, each linear through all steps of the pass, on with the
              weights as decoded from what will be written; or all statistics first, where kept
              weights have their old values (order.Pass.at_once)
block pass:   one step on all linears against the block's output
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import UnsupportedLayer
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
from pocketlm.core.stats import GradientSize, Hessian, Stat
from pocketlm.core.tensors import Dense, WeightTensor
from pocketlm.core.views import BlockView, Group, LinearView
from pocketlm.engine.batches import Batches, Sweep
from pocketlm.engine.factors import run_steps
from pocketlm.engine.folding import fold_groups
from pocketlm.engine.grids import scale_dtype_for
from pocketlm.engine.health import InputHealth, InputWatch
from pocketlm.engine.inputs import Inputs
from pocketlm.engine.order import Pass, passes
from pocketlm.engine.task import Task

FEW_TOKENS = Note("few_tokens", "fewer calibration tokens reached it than it has inputs.")


@dataclass(frozen=True)
class Compressed:
    """One linear after its last step.

    Attributes:
        view: Where it came from.
        weight: What is written; where the block computes, as the mask is.
        spec: The grid that was asked for; None: values stay floats.
        error: Relative squared output error of the weight on the calibration inputs.
        notes: Of every fallback.
        inputs: What reached it; None without calibration data.
        quantizer: What its inputs are rounded with; None: nothing.
        mask_OI: Which weights are not pruned; None: none is.
    """

    view: LinearView
    weight: WeightTensor
    spec: QuantSpec | None
    error: float
    notes: tuple[Note, ...]
    inputs: InputHealth | None
    quantizer: InputQuantizer | None = None
    mask_OI: Tensor | None = None


@dataclass(frozen=True)
class BlockResult:
    """A block after its last step.

    Attributes:
        linears: What was compressed, in order of execution.
        folded: Other tensors that folds have changed, by checkpoint name, as they are stored now.
    """

    linears: list[Compressed]
    folded: dict[str, Tensor]


def compress_block(
    block: BlockView,
    steps: Sequence[Step],
    specs: Mapping[str, QuantSpec | None],
    batches: Batches | None,
    device: torch.device,
    *,
    activations: Mapping[str, ActivationSpec] | None = None,
    kept_dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    seed: int = 0,
    gradients: Mapping[str, Tensor] | None = None,
    report: Callable[[float, float | None], None] = lambda share, loss: None,
) -> BlockResult:
    """Compresses the linears of a block that are chosen; their weights in the block follow.

    Args:
        block: The loaded block; its weights are replaced by what is returned.
        steps: What is done.
        specs: Grids by module path, None where values stay floats; linears not named are kept.
        batches: The calibration data; None where no step needs any.
        device: Where statistics are gathered.
        activations: Module path → how its inputs are rounded, of the linears whose are.
        kept_dtype: In which tensors beside the linears are stored; None: their own.
        scale_dtype: In which plain scales are stored; None: as the weights' dtype has it.
        seed: Of block steps.
        gradients: Module path → how large the loss's gradient is in each weight; None where no
            step asks.
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
                block, one, specs, sweep, inputs, device, results, notes, kept_dtype,
                scale_dtype, gradients, tell,
            )  # fmt: skip
            if sweep is not None and one is todo[-1]:
                assert batches is not None
                if one.at_once:  # its runs stand behind weights of before
                    sweep = batches.sweep()
                sweep.finish()
            del sweep  # the next pass starts from the block's inputs, and with free memory
        elif one.kind == "block":
            assert batches is not None
            inputs.set_all()
            states = {
                view.name: _state(view, specs, inputs, results, notes, shared, scale_dtype)
                for views in _chosen(block, specs)
                for shared in (shared_absmax(views, specs),)
                for view in views
            }
            task = Task(block, states, batches, device, seed, tell)
            step: BlockStep = one.steps[0]
            after = step.compress(task)
            results = {
                name: _finish(
                    block.linears[name], after[name], inputs, None, _seen(results, name), kept_dtype
                )
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


def _chosen(block: BlockView, specs: Mapping[str, QuantSpec | None]) -> list[list[LinearView]]:
    """The linears that are compressed, by group."""
    return [
        [block.linears[name] for name in group.linears if name in specs] for group in block.groups
    ]


def _linear_pass(
    block: BlockView,
    one: Pass,
    specs: Mapping[str, QuantSpec | None],
    sweep: Sweep | None,
    inputs: Inputs,
    device: torch.device,
    earlier: Mapping[str, Compressed],
    notes: Mapping[str, tuple[Note, ...]],
    kept_dtype: torch.dtype | None,
    scale_dtype: torch.dtype | None,
    gradients: Mapping[str, Tensor] | None,
    tell: Callable[[int, int, float | None], None],
) -> dict[str, Compressed]:
    total = sum(map(len, _chosen(block, specs)))
    results: dict[str, Compressed] = {}

    def exchange(original: bool) -> None:
        for name, done in {**earlier, **results}.items():
            weight_OI = done.view.weight_OI() if original else done.weight.dequantize().to(device)
            done.view.set_weight_OI(weight_OI)
            inputs.set(name, on=not original)

    def gathered(place: int) -> tuple[Statistics, InputHealth | None]:
        group, first = block.groups[place], todo[place][0]
        return _gather(group, first, one.steps, sweep, inputs, exchange, device)

    todo = {place: views for place, views in enumerate(_chosen(block, specs)) if views}
    before = {place: gathered(place) for place in todo} if one.at_once else {}
    for place, chosen in todo.items():
        stats, seen = before.pop(place) if one.at_once else gathered(place)
        shared = shared_absmax(chosen, specs)
        for view in chosen:
            state = _state(view, specs, inputs, earlier, notes, shared, scale_dtype)
            if seen is not None and seen.few and FEW_TOKENS not in state.notes:
                state = replace(state, notes=(*state.notes, FEW_TOKENS))
            own = stats
            if gradients is not None:
                own = stats.beside(GradientSize(gradients[view.name].to(device).float()))
            state = run_steps(one.steps, state, own)
            results[view.name] = _finish(view, state, inputs, stats.get(Hessian), seen, kept_dtype)
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
    kinds = dict.fromkeys(kind for step in steps for kind in step.needs if kind.gathered)
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


def shared_absmax(
    views: Sequence[LinearView], specs: Mapping[str, QuantSpec | None]
) -> float | None:
    """The largest weight of linears that share a constant of the tensor (NVFP4), if any do."""
    asked = {view.name: specs[view.name] for view in views}
    sharing = [v for v in views if (spec := asked[v.name]) is not None and spec.scale == "e4m3"]
    return max((float(view.weight_OI().abs().amax()) for view in sharing), default=None)


def _state(
    view: LinearView,
    specs: Mapping[str, QuantSpec | None],
    inputs: Inputs,
    earlier: Mapping[str, Compressed],
    notes: Mapping[str, tuple[Note, ...]],
    shared: float | None,
    scale_dtype: torch.dtype | None,
) -> LinearState:
    """A linear before a pass: its original weight after folds, and what earlier passes made."""
    quantizer = inputs.of(view.name)
    state = LinearState(
        view.name,
        view.weight_OI(),
        specs[view.name],
        scale_dtype or scale_dtype_for(view.dtype),
        notes=notes.get(view.name, ()),
        shared_absmax=shared,
        inputs=None if quantizer is None else quantizer.spec,
    )
    done = earlier.get(view.name)
    if done is None:
        return state
    current = done.weight.to(state.reference_OI.device)
    state = replace(state, current=current, notes=done.notes)
    if done.mask_OI is None:
        return state
    mask_OI = done.mask_OI.to(state.reference_OI.device)
    return replace(state, reference_OI=current.dequantize(), mask_OI=mask_OI)


def _seen(results: Mapping[str, Compressed], name: str) -> InputHealth | None:
    return results[name].inputs if name in results else None


def _finish(
    view: LinearView,
    state: LinearState,
    inputs: Inputs,
    hessian: Hessian | None,
    seen: InputHealth | None,
    kept_dtype: torch.dtype | None,
) -> Compressed:
    """What a pass leaves of a linear; the block goes on with it as it will be executed."""
    weight = state.current
    if weight is None:
        raise UnsupportedLayer(
            "the recipe's last step left the weight as it was.",
            where=view.name,
            remedy="End the recipe with a step that compresses, such as gptq or sparsegpt.",
        )
    if isinstance(weight, Dense):  # rounded as it will be stored
        stored_OI = weight.weight_OI.to(kept_dtype or view.dtype)
        weight = Dense(stored_OI, view.stored_transposed)
    decoded_OI = weight.dequantize()
    # Steps may have moved what they approximate: the error is told against the original.
    error = relative_error(
        view.weight_OI(), decoded_OI, None if hessian is None else hessian.matrix_II()
    )
    view.set_weight_OI(decoded_OI)
    inputs.set(view.name, on=True)
    rounding = inputs.of(view.name)
    return Compressed(view, weight, state.asked, error, state.notes, seen, rounding, state.mask_OI)
