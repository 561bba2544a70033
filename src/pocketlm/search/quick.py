"""The quick method that stands for any other while sensitivities are measured: clip, then round.

What a better method gains is much the same at every place of the model; where bits matter is not.

Legend: T tokens, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pocketlm import __version__, catalog
from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import QuantSpec, StepSpec
from pocketlm.core.state import LinearState, LinearStep, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.views import BlockView, LinearView, ModelView
from pocketlm.engine.grids import scale_dtype_for

STEPS = (
    StepSpec(method="clip", options={"steps": 8}),
    StepSpec(method="rtn"),
)


def context(model: ModelView, windows: Windows) -> dict[str, Any]:
    """What every finding of the quick method depends on, as plain JSON."""
    return {
        "pocketlm": __version__,
        "source": model.source.fingerprint(),
        "windows": windows.sha256,
        "quick": [step.model_dump(mode="json") for step in STEPS],
        "compute_dtype": str(model.compute_dtype),
        "device": model.device.type,
    }


@cache
def quick_steps() -> tuple[LinearStep, ...]:
    """The steps, built once."""
    return tuple(catalog.build_step(step.method, step.options) for step in STEPS)


def quantized(view: LinearView, weight_OI: Tensor, spec: QuantSpec, hessian: Hessian) -> Tensor:
    """A linear's weight [O, I] on a grid, decoded.

    Args:
        view: The linear.
        weight_OI: Its original weight, float32.
        spec: The grid, fitted.
        hessian: Of its inputs.
    """
    state = LinearState(view.name, weight_OI, spec, scale_dtype_for(view.dtype))
    stats = Statistics(hessian)
    for step in quick_steps():
        state = step.compress(state, stats)
    assert state.current is not None
    return state.current.dequantize()


def gathered(inputs: Tensor, device: torch.device) -> Hessian:
    """The Hessian of some inputs [..., I]."""
    hessian = Hessian(inputs.shape[-1], device)
    hessian.add(inputs)
    return hessian


def forward_quantized(
    block: BlockView,
    specs: Mapping[str, QuantSpec],
    hidden_BTD: Tensor,
    call: Any,
    device: torch.device,
) -> Tensor:
    """The block's output with some linears quantized; the block is left as it was.

    The run stops before each group: its statistics are those of the inputs that the linears get.

    Args:
        block: The loaded block, with its original weights.
        specs: Module path → fitted grid of the linears to quantize.
        hidden_BTD: The block's input.
        call: What the block is called with.
        device: Where it computes.

    Returns:
        The output [B, T, D].
    """
    originals: dict[str, Tensor] = {}
    run = block.start(hidden_BTD, call)
    try:
        pause = run.advance()
        while pause is not None:
            chosen = [name for name in block.groups[pause.group].linears if name in specs]
            if chosen:
                hessian = gathered(pause.inputs, device)
            for name in chosen:
                view = block.linears[name]
                originals[name] = view.weight_OI()
                view.set_weight_OI(quantized(view, originals[name], specs[name], hessian))
            pause = run.advance()
        return run.output
    finally:
        for name, weight_OI in originals.items():
            block.linears[name].set_weight_OI(weight_OI)
