"""Steps on a factorised linear: each factor is a linear of its own, with its own inputs.

What comes after a step that factorises knows whole weights only. So
- of W = L R, the steps compress R first, whose inputs are the linear's; then L, whose inputs are
  what the compressed R gives: their Hessian is R H Rᵀ, and L is fitted to them before;
- of W = B + L R, the steps compress B, against what L R leaves of the weight.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.factored import LowRank, Sum, best_left
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, LinearStep, Note, Statistics, Step
from pocketlm.core.stats import Hessian
from pocketlm.core.stored import DenseSpec, LowRankSpec, SparseSpec, SumSpec, WeightSpec
from pocketlm.core.tensors import Dense, PackedFloat, PackedInt, Sparse, WeightTensor


def run_steps(steps: Sequence[LinearStep], state: LinearState, stats: Statistics) -> LinearState:
    """A linear through the steps of a pass, its factors where it has some.

    Args:
        steps: In order.
        state: The linear, perhaps factorised by an earlier pass.
        stats: Of its inputs.

    Returns:
        The state after the last step.

    Raises:
        UnsupportedLayer: If a step leaves a factor in a form that no factor has.
    """
    for place, step in enumerate(steps):
        if "factors" in step.preserves | step.makes:
            state = step.compress(state, stats)
        elif isinstance(state.current, LowRank):
            return _both_factors(steps[place:], state, state.current, stats)
        elif isinstance(state.current, Sum):
            state = _base(step, state, state.current, stats)
        else:
            state = step.compress(state, stats)
    return state


def _base(step: LinearStep, state: LinearState, current: Sum, stats: Statistics) -> LinearState:
    left_over_OI = state.reference_OI - current.low.dequantize()
    before = replace(state, reference_OI=left_over_OI, current=current.base)
    after = step.compress(before, stats)
    base = _require(after.current, current.base, state.name)
    # What a step has moved its reference by, it has moved the whole linear's by.
    moved_OI = state.reference_OI + (after.reference_OI - left_over_OI)
    return replace(after, reference_OI=moved_OI, current=Sum(base, current.low))


def _both_factors(
    steps: Sequence[LinearStep], state: LinearState, current: LowRank, stats: Statistics
) -> LinearState:
    product_OI, right_RI = current.dequantize(), current.right.dequantize()
    right, notes = _factor(steps, state, "right", right_RI, current.right, stats)
    hessian = stats.get(Hessian)
    given_RI = right.dequantize()
    carried = Statistics() if hessian is None else Statistics(hessian.through(given_RI))
    left_OR = best_left(product_OI, given_RI, hessian)
    left, more = _factor(steps, state, "left", left_OR, current.left, carried)
    return state.with_current(LowRank(left, right), *notes, *more)


def _factor(
    steps: Sequence[LinearStep],
    state: LinearState,
    side: str,
    reference: Tensor,
    current: Dense | PackedInt | PackedFloat,
    stats: Statistics,
) -> tuple[Dense | PackedInt | PackedFloat, list[Note]]:
    """One factor after all steps, and what they had to tell of it."""
    alone = LinearState(
        name=f"{state.name}.{side}",
        reference_OI=reference,
        asked=None if state.asked is None else state.asked.fit(reference.shape[1]),
        scale_dtype=state.scale_dtype,
        current=current,
        inputs=state.inputs if side == "right" else None,
    )
    for step in steps:
        alone = step.compress(alone, stats)
    result = alone.current
    if not isinstance(result, Dense | PackedInt | PackedFloat):
        raise UnsupportedLayer(
            f"a step left its {side} factor as {type(result).__name__}, which no factor can be.",
            where=state.name,
            remedy="Put the step before the one that factorises.",
        )
    return result, [replace(note, text=f"its {side} factor: {note.text}") for note in alone.notes]


def _require(
    result: WeightTensor | None, before: Dense | PackedInt | PackedFloat | Sparse, name: str
) -> Dense | PackedInt | PackedFloat | Sparse:
    if result is None:
        return before
    if not isinstance(result, Dense | PackedInt | PackedFloat | Sparse):
        raise UnsupportedLayer(
            f"a step left its base as {type(result).__name__}.",
            where=name,
            remedy="Put the step before the one that adds a low-rank part.",
        )
    return result


def predicted_form(
    steps: Sequence[Step],
    name: str,
    shape: tuple[int, int],
    asked: QuantSpec | None,
    base: WeightSpec,
    dtype: str,
) -> WeightSpec:
    """In what form a linear will be stored, factors and all.

    Args:
        steps: The recipe's.
        name: Module path.
        shape: (O, I).
        asked: Its grid, fitted to the columns; None: values stay floats.
        base: What is stored of a weight without factors: codes or floats, perhaps sparse.
        dtype: Of 16-bit values.

    Raises:
        ConfigError: If a step cannot do what its place in the recipe asks of it.
    """
    form: WeightSpec = base if asked is None else DenseSpec.model_validate({"dtype": dtype})
    for step in steps:
        if "factors" in step.makes:
            factoring: Any = step
            form = factoring.form(name, shape, form, dtype)
        elif "grid" in step.makes and asked is not None:
            form = _after_grid(form, asked, base, name)
    return form


def _after_grid(form: WeightSpec, asked: QuantSpec, base: WeightSpec, name: str) -> WeightSpec:
    if isinstance(form, LowRankSpec):
        return LowRankSpec(rank=form.rank, left=asked.fit(form.rank), right=asked)
    if not isinstance(form, SumSpec):
        return base
    if isinstance(form.base, SparseSpec) and form.base != base:
        raise ConfigError(
            "a sparse part beside factors is stored as floats; nothing quantizes it.",
            where=name,
            remedy="Leave out the steps after losparse, and set `weights: null`.",
        )
    return form
