"""How linears are quantized while sensitivities are measured.

The errors of all grids come from a quick method, clip, then round: between the grids of one linear
they keep their ratio. How much one linear's change weighs beside another's does depend on the
method (feedback mends much of what q, k and v lose, and little of down), so that a KL is measured
with the linear steps of the recipe itself.

Legend: B sequences, T tokens, D hidden width, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm import catalog
from pocketlm.core.spec import QuantSpec, Recipe, StepSpec
from pocketlm.core.state import LinearState, LinearStep, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.views import BlockView, LinearView
from pocketlm.engine.grids import scale_dtype_for

QUICK = (StepSpec(method="clip", options={"steps": 8}), StepSpec(method="rtn"))
INSTEAD = (StepSpec(method="clip"), StepSpec(method="gptq"))  # of steps that need whole blocks


def linear_steps(steps: Sequence[StepSpec]) -> tuple[LinearStep, ...]:
    """The steps that need one linear and its Hessian alone."""
    built = [catalog.build_step(step.method, step.options) for step in steps]
    return tuple(step for step in built if step.kind == "linear" and set(step.needs) <= {Hessian})


def own_steps(recipe: Recipe) -> tuple[LinearStep, ...]:
    """A recipe's own linear steps; clip → gptq where it has none."""
    return linear_steps(recipe.steps) or linear_steps(INSTEAD)


def quantized(
    view: LinearView,
    weight_OI: Tensor,
    spec: QuantSpec,
    hessian: Hessian,
    steps: Sequence[LinearStep],
) -> Tensor:
    """A linear's weight [O, I] on a grid, decoded.

    Args:
        view: The linear.
        weight_OI: Its original weight, float32.
        spec: The grid, fitted.
        hessian: Of its inputs.
        steps: How it is quantized.
    """
    state = LinearState(view.name, weight_OI, spec, scale_dtype_for(view.dtype))
    stats = Statistics(hessian)
    for step in steps:
        state = step.compress(state, stats)
    assert state.current is not None
    return state.current.dequantize()


def gathered(inputs: Tensor, device: torch.device) -> Hessian:
    """The Hessian of some inputs [..., I]."""
    hessian = Hessian(inputs.shape[-1], device)
    hessian.add(inputs)
    return hessian


def hessians_of(
    block: BlockView,
    names: Collection[str],
    hidden_BTD: Tensor,
    call: Any,
    device: torch.device,
) -> tuple[dict[str, Hessian], Tensor]:
    """The Hessians of some linears' inputs, and the block's output.

    Args:
        block: The loaded block.
        names: Module paths; one that no token reaches gets an empty Hessian.
        hidden_BTD: The block's input.
        call: What the block is called with.
        device: Where it computes.
    """
    found = {name: Hessian(block.linears[name].in_features, device) for name in names}
    run = block.start(hidden_BTD, call)
    pause = run.advance()
    while pause is not None:
        wanted = [name for name in block.groups[pause.group].linears if name in found]
        if wanted:
            hessian = gathered(pause.inputs, device)
            found.update(dict.fromkeys(wanted, hessian))
        pause = run.advance()
    return found, run.output


def forward_with(
    block: BlockView, weights: Mapping[str, Tensor], hidden_BTD: Tensor, call: Any
) -> Tensor:
    """The block's output [B, T, D] with some weights [O, I] replaced; it is left as it was."""
    originals = {name: block.linears[name].weight_OI() for name in weights}
    try:
        for name, weight_OI in weights.items():
            block.linears[name].set_weight_OI(weight_OI)
        return block.forward(hidden_BTD, call)
    finally:
        for name, weight_OI in originals.items():
            block.linears[name].set_weight_OI(weight_OI)
