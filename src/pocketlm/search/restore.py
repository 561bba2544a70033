"""KL from the original to a compressed model in which some linears are the original's again.

A *variant* leaves the compressed model's stream at its first restored block and runs on through all
later ones; variants of a pass share each block that is read. Where scales were folded between the
tensors of a block, a linear of the original does not fit in alone: such a block is restored whole.

Legend: B sequences, T tokens, D hidden width, N predicted positions, P positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor

from pocketlm.core.errors import NumericError
from pocketlm.core.views import BlockView
from pocketlm.evaluate import hidden
from pocketlm.evaluate.divergence import score_tokens
from pocketlm.evaluate.quality import LOGIT_BYTES, LOGIT_COPIES
from pocketlm.models.adapter import Model

Restored = frozenset[str]  # module paths of linears


class Restorer:
    """Measures variants of one compressed model on one batch of text; `close` frees what it holds.

    Args:
        model: The compressed model, decoded.
        original: What it was made from, computing in the same dtype.
        tokens_BT: int64 ids of the text.
        whole: Indices of blocks that are restored whole or not at all.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, original: Model, tokens_BT: Tensor, whole: Collection[int]
    ) -> None:
        self._model, self._original, self._whole = model, original, whole
        self._next_N = tokens_BT[:, 1:].flatten().to(model.device)
        with closing(hidden.stream(original, tokens_BT, lambda: None)) as states:
            self._base_ND = _positions(states.read(0, len(tokens_BT)).clone())
        _, self._their_call = original.begin(tokens_BT.to(original.device))
        hidden_BTD, self._call = model.begin(tokens_BT.to(model.device))
        _, length, width = hidden_BTD.shape
        shape = (len(model.block_paths) * len(tokens_BT), length, width)
        self._batch = len(tokens_BT)
        self._inputs = hidden.HiddenStates(shape, hidden_BTD.dtype, hidden.RAM_BUDGET_BYTES)
        for index in range(len(model.block_paths)):
            self._inputs.write(index * self._batch, hidden_BTD.cpu())
            with model.block(index) as block:
                hidden_BTD = block.forward(hidden_BTD, self._call)
        self._end_ND = _positions(model.finish(hidden_BTD)).cpu()

    def close(self) -> None:
        """Frees the activations."""
        self._inputs.close()

    @torch.no_grad()
    def measure(self, variants: Sequence[Restored]) -> list[float]:
        """The mean KL of each variant in nats a token; the empty one is the model as it is.

        Args:
            variants: What each restores, linears by module path.

        Raises:
            NumericError: If logits are not finite.
        """
        paths = self._model.block_paths
        parts = [_by_block(variant, paths) for variant in variants]
        states: dict[int, Tensor] = {}
        for index in range(
            min((min(part) for part in parts if part), default=len(paths)), len(paths)
        ):
            with ExitStack() as stack:
                block = stack.enter_context(self._model.block(index))
                theirs: BlockView | None = None
                if any(index in part for part in parts):
                    theirs = stack.enter_context(self._original.block(index))
                for variant, part in enumerate(parts):
                    if not part or index < min(part):
                        continue
                    if index == min(part):
                        states[variant] = self._input(index)
                    hidden_BTD = states[variant].to(self._model.device)
                    if index not in part or theirs is None:
                        output_BTD = block.forward(hidden_BTD, self._call)
                    elif index in self._whole:
                        output_BTD = theirs.forward(hidden_BTD, self._their_call)
                    else:
                        output_BTD = self._with_theirs(block, theirs, part[index], hidden_BTD)
                    states[variant] = output_BTD.cpu()
        return [
            self._kl(self._finished(states.get(variant)), variants[variant])
            for variant in range(len(variants))
        ]

    def _input(self, index: int) -> Tensor:
        """What a block of the compressed model reads, [B, T, D]."""
        return self._inputs.read(index * self._batch, (index + 1) * self._batch)

    def _with_theirs(
        self, block: BlockView, theirs: BlockView, names: Collection[str], hidden_BTD: Tensor
    ) -> Tensor:
        """The block's output with some of the original's linears; it is left as it was."""
        own: dict[str, Tensor] = {}
        try:
            for name in names:
                view = block.linears[name]
                own[name] = view.weight_OI()
                view.set_weight_OI(theirs.linears[name].weight_OI())
                view.set_input_quantizer(None)
            return block.forward(hidden_BTD, self._call)
        finally:
            for name, weight_OI in own.items():
                block.linears[name].set_weight_OI(weight_OI)
                block.linears[name].set_input_quantizer(self._model.quantizers.get(name))

    def _finished(self, state_BTD: Tensor | None) -> Tensor:
        if state_BTD is None:
            return self._end_ND
        return _positions(self._model.finish(state_BTD.to(self._model.device)))

    def _kl(self, end_ND: Tensor, variant: Restored) -> float:
        step, total = max(1, LOGIT_BYTES // (4 * LOGIT_COPIES * self._model.vocabulary)), 0.0
        for start in range(0, len(self._next_N), step):
            part = slice(start, start + step)
            base_PV = self._original.logits(self._base_ND[part].to(self._original.device))
            logits_PV = self._model.logits(end_ND[part].to(self._model.device))
            scores = score_tokens(logits_PV, self._next_N[part], base_PV)
            assert scores.kl is not None
            total += float(scores.kl.sum())
        if not math.isfinite(total):
            raise NumericError(
                f"logits are not finite with {len(variant)} linears restored.",
                where=min(variant, default="the compressed model"),
                remedy="Check the artifact with `pocketlm verify`.",
            )
        return total / len(self._next_N)


def _by_block(names: Restored, paths: Sequence[str]) -> dict[int, list[str]]:
    """Linears by the index of their block."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        index = next(i for i, path in enumerate(paths) if name.startswith(f"{path}."))
        found.setdefault(index, []).append(name)
    return found


def _positions(finished_BTD: Tensor) -> Tensor:
    return finished_BTD[:, :-1].flatten(0, 1)
