"""Gradients of the loss in the weights of all blocks, one loaded block at a time.

Forward through the blocks, every boundary kept; then backward, last block first. The text is a few
of the first calibration windows: a gradient needs less of it than a Hessian.

Legend: B sequences, T tokens, N sequences of all batches, D hidden width, O output rows, I columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pocketlm.core.transform import Findings
from pocketlm.core.views import BlockView, ModelView
from pocketlm.formats.shards import write_file

TOKENS = 8192  # of the calibration text
LOGIT_BYTES, LOGIT_COPIES = 256 << 20, 6  # [P, V] float32 tensors alive at once

Look = Callable[[int, BlockView, Mapping[str, Tensor]], dict[str, Tensor]]
Report = Callable[[float, str], None]


def first_windows(tokens_NT: Tensor, most: int) -> Tensor:
    """As many whole windows as `most` tokens hold, one at least."""
    return tokens_NT[: max(1, most // tokens_NT.shape[1])]


def positions_at_once(model: ModelView) -> int:
    """How many positions may have their logits in memory at once."""
    return max(1, LOGIT_BYTES // (4 * LOGIT_COPIES * model.vocabulary))


def walk_back(
    model: ModelView, batches: list[Tensor], look: Look, report: Report, *, squares: bool = False
) -> Findings:
    """Hands gradients in each linear's weight [O, I] to `look`, last block first.

    Args:
        model: The model.
        batches: Token ids [B, T] each.
        look: Given a block's index, the block and its gradients by module path.
        report: Told the share that is done, and of what.
        squares: Whether the gradients are of each batch's own mean loss and their squares are
            summed; else they are of the mean loss of all.

    Returns:
        What `look` gave, by block.
    """
    total = len(model.block_paths)
    calls: list[Any] = []
    bounds: list[list[Tensor]] = [[]]
    with torch.no_grad():
        for tokens_BT in batches:
            hidden_BTD, call = model.begin(tokens_BT)
            bounds[0].append(hidden_BTD.cpu())
            calls.append(call)
        for index in range(total):
            with model.block(index) as block:
                outputs = [
                    block.forward(x.to(model.device), call).cpu()
                    for x, call in zip(bounds[-1], calls, strict=True)
                ]
            bounds.append(outputs)
            report((index + 1) / (3 * total), f"forward through block {index + 1}")
    counts = [tokens_BT[:, 1:].numel() for tokens_BT in batches]
    slopes = [
        model.loss_gradient(x, tokens_BT, positions_at_once(model)).cpu()
        / (count if squares else sum(counts))
        for x, tokens_BT, count in zip(bounds.pop(), batches, counts, strict=True)
    ]
    found: Findings = []
    for index in reversed(range(total)):
        with model.block(index) as block:
            sums: dict[str, Tensor] = {}
            before = bounds.pop()
            for batch, call in enumerate(calls):
                slopes[batch], gradients = _back(
                    block, before[batch].to(model.device), call, slopes[batch].to(model.device)
                )
                for name, gradient_OI in gradients.items():
                    term_OI = gradient_OI.square() if squares else gradient_OI
                    sums[name] = sums[name].add_(term_OI) if name in sums else term_OI
            found.append({n: v.cpu().contiguous() for n, v in look(index, block, sums).items()})
        done = 1 / 3 + (total - index) * 2 / (3 * total)
        report(done, f"gradients of block {index + 1} of {total}")
    return found[::-1]


def _back(
    block: BlockView, before_BTD: Tensor, call: Any, slope_BTD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient in a block's input, and those in its weights."""
    weights = {n: view.weight_OI().requires_grad_() for n, view in block.linears.items()}
    before_BTD = before_BTD.requires_grad_()
    with torch.enable_grad():
        after_BTD = block.forward_with(weights, before_BTD, call)
    first, *rest = torch.autograd.grad(
        after_BTD, [before_BTD, *weights.values()], slope_BTD, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    # an expert that no token reached has a gradient of zeros
    return first.cpu(), dict(zip(weights, rest, strict=True))


def keep_gradients(model: ModelView, tokens_NT: Tensor, directory: Path, report: Report) -> None:
    """Writes √ E g² of every weight, g the gradient of a sequence's mean loss: a file a block.

    bfloat16, as large as the model's linears. An earlier attempt's whole set is left as it is.

    Args:
        model: The original.
        tokens_NT: Calibration tokens.
        directory: Where to.
        report: Told the share that is done, and of what.
    """
    if _path(directory, 0).exists():  # the first block's is written last
        return
    directory.mkdir(parents=True, exist_ok=True)
    windows = first_windows(tokens_NT, TOKENS)

    def write(index: int, block: BlockView, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = {n: (s / len(windows)).sqrt().bfloat16().cpu() for n, s in sums.items()}
        write_file(_path(directory, index), save(sizes))
        return {}

    walk_back(model, list(windows.split(1)), write, report, squares=True)


def read_gradients(directory: Path, index: int) -> dict[str, Tensor]:
    """What `keep_gradients` has kept of a block: module path → [O, I]."""
    return load(_path(directory, index).read_bytes())


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:05d}.safetensors"
