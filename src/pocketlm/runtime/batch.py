"""Rows that come and go while others are written: continuous batching over one static cache.

The newest token of every row stands in one column, the batch's length; a row that begins later has
more padding on its left. So a row joins by having its prompt computed alone and copied in front of
that column, a step is the Decoder's own, and a row leaves by giving its place to the last one. When
the longest rows have gone, what is held moves left. A step costs as many rows as there are; room is
that of the longest row for every row, where a paged cache would take less.

Deviation from Orca's iteration-level scheduling (OSDI 2022), where this comes from: prompts are not
part of a step, and attention reads every row up to the longest one's length.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketlm.runtime.decode import CAPACITY_STEP, Decoder, common_start
from pocketlm.runtime.native.step import ROWS as ROWS_IN_C

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeptLogits:
    """Stands where a Sampling would: keeps a step's logits for one who chooses row by row."""

    def __init__(self, rows: int) -> None:
        self._rows, self._logits_BV = rows, torch.empty(0)

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """Copies the logits to a place that lives on, as a graph needs; the likeliest tokens."""
        if self._logits_BV.shape[-1] != logits_BV.shape[-1]:
            shape = (self._rows, logits_BV.shape[-1])
            self._logits_BV = torch.empty(shape, device=logits_BV.device)  # float32
        self._logits_BV[: len(logits_BV)].copy_(logits_BV)
        return logits_BV.argmax(-1)

    def read(self, rows: int) -> Tensor:
        """Those of the first rows [rows, V]; overwritten by the next step."""
        return self._logits_BV[:rows]


class Batch(Decoder):
    """Rows of one model that join and leave between steps.

    Args:
        model: From `load`, in eval mode.
        most: Rows at once; 1 where the model's state cannot lie in a static cache.

    Attributes:
        most: The same.
        active: Rows now.
    """

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        super().__init__(model, most)
        self._prompts = Decoder(model)  # computes a prompt; the next may begin alike
        self._prompt: list[int] = []
        self.most = most if self._static_refused is None else 1
        self.sampling = self._kept = KeptLogits(self.most)
        self._prompts.sampling = self._kept_prompt = KeptLogits(1)
        self._all_tokens_B, self._all_pads_B = self.tokens_B, self._pad_B
        self._padding: list[int] = []  # of the active rows
        self._other_lean = None  # that of few rows while there are many, and the other way round
        self.active = 0

    @torch.inference_mode()
    def join(self, prompt: Sequence[int]) -> Tensor:
        """Adds a row at the end.

        Args:
            prompt: Its ids, at least one.

        Returns:
            Logits of what follows them [V]; overwritten by the next row that joins.
        """
        ids = list(prompt)
        self._prompts.cut(common_start(self._prompt, ids[:-1]))
        self._prompt = []  # should the next line fail
        self._prompts.prefill([ids[self._prompts.length :]])
        self._prompt = ids
        if self._static_refused is None:
            self._append(len(ids))
        self.active += 1
        return self._kept_prompt.read(1)[0]

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each row.

        Args:
            tokens: One for each active row, in order.

        Returns:
            Logits of what follows [active, V]; overwritten by the next step.
        """
        if self._static_refused is not None:
            self._prompts.tokens_B.copy_(torch.tensor(tokens))
            self._prompts.step()
            return self._kept_prompt.read(1)
        spare = min(self._padding)
        if spare >= CAPACITY_STEP or (spare and self.length == self._cache.capacity):
            self._move(-spare)
        self.tokens_B[: self.active].copy_(torch.tensor(tokens))
        self.step()
        return self._kept.read(self.active)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Ends a row; the last one takes its place."""
        self.active -= 1
        if self._static_refused is not None:
            self._prompt = []  # what it wrote follows the prompt there
            return
        last = self.active
        if row != last:
            held = slice(self._padding[last], self.length)
            self._cache.take(row, self.length, self._cache, last, held)
            self._padding[row] = self._padding[last]
        self._padding.pop()
        self._resize()

    def position_bytes(self) -> int:
        """Memory of one position of one row; 0 where there is no static cache to tell."""
        cache = self._prompts._cache
        return 0 if self._static_refused is not None else cache.position_bytes()

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions of every row."""
        if self._cache is None and self._static_refused is None:
            from pocketlm.models.static_cache import static_cache

            wanted = -(-positions // CAPACITY_STEP) * CAPACITY_STEP
            self._cache = static_cache(self.model, wanted, self.most)
        had = None if self._cache is None else self._cache.capacity
        super().reserve(positions)
        if self._cache is not None and self._cache.capacity != had:
            self._other_lean = None

    def _append(self, count: int) -> None:
        """Copies the prompt's keys and values into the next row, ending in the batch's column."""
        if self.active == 0:
            self.length = count
        self.reserve(max(self.length, count) + 1)
        if count > self.length:
            self._move(count - self.length)
        self._cache.take(self.active, self.length, self._prompts._cache, 0, slice(0, count))
        self._padding.append(self.length - count)
        self._resize()

    def _move(self, by: int) -> None:
        """Moves all rows, and the column that they end in."""
        self._cache.shift(self.active, self.length, by)
        self.length += by
        self._padding = [pad + by for pad in self._padding]
        self._resize()

    def _resize(self) -> None:
        """Brings the decoder's rows to the active ones; on CUDA to 1, 4, 16 …: few graphs."""
        rows = max(1, len(self._padding))
        if self._graphs_on:
            rows = min(next(4**n for n in range(16) if 4**n >= rows), self.most)
        if self.device.type == "cpu" and (rows <= ROWS_IN_C) != (self.rows <= ROWS_IN_C):
            self._lean, self._other_lean = self._other_lean, self._lean
            self._lean_on = True
        self.rows, self.tokens_B = rows, self._all_tokens_B[:rows]
        self._pad_B = self._all_pads_B[:rows]
        self._pad_B.copy_(torch.tensor([*self._padding, *[0] * (rows - len(self._padding))]))
        self._padded = any(self._padding)
