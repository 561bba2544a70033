"""What each direction of each linear carries: one streamed pass of the original model.

The squared singular values of W S, S Sᵀ = XXᵀ for the original's inputs X: dropping a direction
costs its value of |W X|² (`lowrank.svd_llm`). A pass over the text, a factorisation for each group
of linears and the singular values of each linear; nothing but those is kept.

Legend: N windows, T tokens, O output rows, I input columns, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pocketlm.core.stats import Hessian
from pocketlm.core.views import BlockView, LinearView, ModelView
from pocketlm.lowrank.allocate import Spectrum
from pocketlm.lowrank.factor import whitening

TOKENS_AT_ONCE = 2048


@torch.no_grad()
def measure_spectra(
    model: ModelView,
    tokens_NT: Tensor,
    names: Collection[str],
    damping: float,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Spectrum]:
    """The spectra of some linears.

    Args:
        model: The original.
        tokens_NT: int64 ids.
        names: Module paths.
        damping: As in `SvdLlm`.
        on_block: Called with blocks done and in all.

    Returns:
        Module path → spectrum, in the model's order.

    Raises:
        NumericError: If a Hessian stays singular on every rung.
    """
    at_once = max(1, TOKENS_AT_ONCE // tokens_NT.shape[1])
    runs = [model.begin(tokens_BT.to(model.device)) for tokens_BT in tokens_NT.split(at_once)]
    found: dict[str, Spectrum] = {}
    total = len(model.block_paths)
    for index in range(total):
        with model.block(index) as block:
            hessians = {
                group.index: Hessian(block.linears[group.linears[0]].in_features, model.device)
                for group in block.groups
                if any(name in names for name in group.linears)
            }
            for place, (hidden_BTD, call) in enumerate(runs):
                runs[place] = (_through(block, hidden_BTD, call, hessians), call)
            for group in block.groups:
                for name in group.linears:
                    if name in names:
                        hessian = hessians[group.index]
                        found[name] = _spectrum(block.linears[name], hessian, damping)
        on_block(index + 1, total)
    return found


def _through(
    block: BlockView, hidden_BTD: Tensor, call: object, hessians: dict[int, Hessian]
) -> Tensor:
    run = block.start(hidden_BTD, call)
    pause = run.advance()
    while pause is not None:
        if pause.group in hessians:
            hessians[pause.group].add(pause.inputs)
        pause = run.advance()
    return run.output


def _spectrum(view: LinearView, hessian: Hessian, damping: float) -> Spectrum:
    weight_OI = view.weight_OI()
    metric, _ = whitening(hessian, damping, 0.0)
    values_R = torch.linalg.svdvals(metric.weigh(weight_OI).to(weight_OI.device))
    rows, columns = weight_OI.shape
    return Spectrum((rows, columns), values_R.square().cpu())
