"""KL from the original to the model in which one unit alone is quantized.

A *variant* leaves the original's stream at its unit's block and runs on through all later blocks.
Variants of neighbouring blocks run together, so that a block is read once for many of them; a pass
holds as many as memory allows and keeps each pass short enough to be lost. What the passes read
grows with the square of the depth, what they compute is the variants' own forward passes.

Legend: B sequences, T tokens, D hidden width, P positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.errors import NumericError
from pocketlm.core.views import ModelView
from pocketlm.engine.machine import call_seconds, matmul_flops
from pocketlm.engine.memory import hidden_bytes, hidden_width
from pocketlm.evaluate.divergence import score_tokens
from pocketlm.search.ends import EndRows
from pocketlm.search.quick import forward_quantized
from pocketlm.search.units import Candidate, Unit

HELD_BYTES = 2 << 30  # of all variants' activations in a pass
HELD_MOST = 32  # variants of a pass: what a kill loses
LOGIT_BYTES, LOGIT_COPIES = 512 << 20, 6  # as in evaluation: [P, V] float32 tensors alive at once
OVERHEAD = 1.6  # of a forward pass over its matrix products: attention, norms, softmax of logits
CALLS = 60  # small operations of a block


@dataclass(frozen=True, eq=False)
class Variant:
    """The original with one unit on one grid."""

    unit: Unit
    candidate: Candidate


class Work:
    """What a forward pass through each block, and through the head, costs in multiplications.

    Args:
        model: The model.
        tokens: Of the batch.
    """

    def __init__(self, model: ModelView, tokens: int) -> None:
        blocks = [0] * len(model.block_paths)
        for name, (rows, columns) in model.linear_shapes().items():
            index = next(i for i, p in enumerate(model.block_paths) if name.startswith(f"{p}."))
            blocks[index] += rows * columns
        self.blocks = [tokens * weights for weights in blocks]
        self.head = tokens * model.vocabulary * hidden_width(model)
        self._model, self._tokens = model, tokens

    def of(self, variant: Variant) -> int:
        """Of one variant: its own block, all later ones and the head."""
        return sum(self.blocks[variant.unit.block :]) + self.head

    def seconds(self, variants: Sequence[Variant]) -> float:
        """What measuring them takes on this machine, roughly."""
        products = sum(self.of(variant) for variant in variants)
        blocks = sum(len(self.blocks) - variant.unit.block for variant in variants)
        rate, each_call = self._rates
        return OVERHEAD * 2 * products / rate + blocks * CALLS * each_call

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """Measured: floating-point operations a second, seconds of a small operation."""
        device, dtype = self._model.device, self._model.compute_dtype
        rate = matmul_flops(device, dtype, self._tokens, hidden_width(self._model))
        return rate, call_seconds(device)


def passes(
    model: ModelView, variants: Sequence[Variant], tokens: int
) -> list[tuple[range, list[Variant]]]:
    """Variants in passes: the blocks that each pass leaves the original from, and its variants."""
    held = max(1, min(HELD_MOST, HELD_BYTES // hidden_bytes(model, tokens)))
    by_block: dict[int, list[Variant]] = {}
    for variant in variants:
        by_block.setdefault(variant.unit.block, []).append(variant)
    found: list[tuple[range, list[Variant]]] = []
    for block in sorted(by_block):
        if found and len(found[-1][1]) + len(by_block[block]) <= held:
            blocks, together = found[-1]
            found[-1] = (range(blocks.start, block + 1), together + by_block[block])
        else:
            found.append((range(block, block + 1), by_block[block]))
    return found


@torch.no_grad()
def measure_divergences(
    model: ModelView,
    tokens_BT: Tensor,
    variants: Sequence[Variant],
    keep: Callable[[Variant, float], None],
    on_work: Callable[[int], None],
) -> None:
    """Measures the mean KL of some variants, pass by pass.

    Args:
        model: The original.
        tokens_BT: int64 ids of one batch.
        variants: What is measured.
        keep: Called with each finding, in nats a token.
        on_work: Called with the work that a step did, in the unit of `Work`.

    Raises:
        NumericError: If a variant's logits are not finite.
    """
    tokens_BT = tokens_BT.to(model.device)
    work = Work(model, tokens_BT.numel())
    ends = [variant for variant in variants if variant.unit.end is not None]
    inside = [variant for variant in variants if variant.unit.end is None]
    planned = passes(model, inside, tokens_BT.numel())
    hidden_BTD, call = model.begin(tokens_BT)
    finished_BTD, inputs = _original(
        model, hidden_BTD, call, {blocks.start for blocks, _ in planned}
    )
    if ends:
        apart = _through_ends(model, tokens_BT, ends, finished_BTD, on_work, work)
        for variant, kl in _score(model, finished_BTD, tokens_BT, apart, on_work, work.head):
            keep(variant, kl)
    for blocks, together in planned:
        hidden_BTD = inputs.pop(blocks.start).to(model.device)
        apart = {}
        for index in range(blocks.start, len(work.blocks)):
            with model.block(index) as block:
                for variant, state_BTD in apart.items():
                    apart[variant] = block.forward(state_BTD.to(model.device), call).cpu()
                    on_work(work.blocks[index])
                for variant in together:
                    if variant.unit.block == index:
                        apart[variant] = forward_quantized(
                            block, variant.candidate.specs, hidden_BTD, call, model.device
                        ).cpu()
                        on_work(work.blocks[index])
                if index + 1 < blocks.stop:
                    hidden_BTD = block.forward(hidden_BTD, call)
        apart = {v: model.finish(state.to(model.device)) for v, state in apart.items()}
        for variant, kl in _score(model, finished_BTD, tokens_BT, apart, on_work, work.head):
            keep(variant, kl)


def _through_ends(
    model: ModelView,
    tokens_BT: Tensor,
    variants: Sequence[Variant],
    finished_BTD: Tensor,
    on_work: Callable[[int], None],
    work: Work,
) -> dict[Variant, Tensor]:
    """The finished activations of variants of embedding and head: the blocks run on all at once."""
    apart: dict[Variant, Tensor] = {}
    call: Any = None
    for variant in variants:
        if variant.unit.end is not None and variant.unit.end.embeds:
            with model.with_ends(_rows(model, variant)):
                apart[variant], call = model.begin(tokens_BT)
    for index in range(len(model.block_paths)) if apart else ():
        with model.block(index) as block:
            for variant, hidden_BTD in apart.items():
                apart[variant] = block.forward(hidden_BTD.to(model.device), call).cpu()
                on_work(work.blocks[index])
    ended = {v: model.finish(state.to(model.device)) for v, state in apart.items()}
    return {variant: ended.get(variant, finished_BTD) for variant in variants}


def _rows(model: ModelView, variant: Variant) -> dict[str, EndRows]:
    """What takes the place of an end's weight in a variant."""
    end = variant.unit.end
    assert end is not None
    return {end.tensor: EndRows(model, end, variant.candidate.specs[end.name])}


def _logits(model: ModelView, rows: dict[str, EndRows] | None, hidden_ND: Tensor) -> Tensor:
    """float32 logits [N, V] through the head of the original, or of a variant."""
    if rows is None:
        return model.logits(hidden_ND)
    with model.with_ends(rows):
        return model.logits(hidden_ND)


def _original(
    model: ModelView, hidden_BTD: Tensor, call: Any, wanted: set[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The original's finished activations, and its input [B, T, D] to some blocks, on the CPU."""
    inputs: dict[int, Tensor] = {}
    for index in range(len(model.block_paths)):
        if index in wanted:
            inputs[index] = hidden_BTD.cpu()
        with model.block(index) as block:
            hidden_BTD = block.forward(hidden_BTD, call)
    return model.finish(hidden_BTD), inputs


def _score(
    model: ModelView,
    finished_BTD: Tensor,
    tokens_BT: Tensor,
    apart: dict[Variant, Tensor],
    on_work: Callable[[int], None],
    head_work: int,
) -> list[tuple[Variant, float]]:
    """The mean KL of each variant's finished activations, but for each sequence's last."""
    ends = {variant: _positions(state) for variant, state in apart.items()}
    heads = {v: _rows(model, v) for v in apart if v.unit.end is not None and v.unit.end.heads}
    base_ND, next_N = _positions(finished_BTD), tokens_BT[:, 1:].flatten()
    totals = dict.fromkeys(ends, 0.0)
    step = max(1, LOGIT_BYTES // (4 * LOGIT_COPIES * model.vocabulary))
    for start in range(0, len(next_N), step):
        part = slice(start, start + step)
        base_PV = model.logits(base_ND[part])
        for variant, end_ND in ends.items():
            logits_PV = _logits(model, heads.get(variant), end_ND[part])
            scores = score_tokens(logits_PV, next_N[part], base_PV)
            assert scores.kl is not None
            totals[variant] += float(scores.kl.sum())
            on_work(head_work * len(scores.kl) // len(next_N))
    for variant, total in totals.items():
        if not math.isfinite(total):
            raise NumericError(
                "its logits are not finite when it alone is quantized.",
                where=f"{variant.unit.name}, {_bits(variant.candidate)}",
                remedy="Check the model with `pocketlm eval`, or put the layer into --ignore.",
            )
    return [(variant, total / len(next_N)) for variant, total in totals.items()]


def _bits(candidate: Candidate) -> str:
    return "kept" if candidate.spec is None else f"{candidate.spec.bits} bits"


def _positions(finished_BTD: Tensor) -> Tensor:
    return finished_BTD[:, :-1].flatten(0, 1)
