"""Removes whole blocks: those without which the model changes least.

    influence    1 - E[cos(xᵢ, xᵢ₊₁)] of its input and output (ShortGPT, arXiv:2403.03853)
    perplexity   of the model without the block (Shortened LLaMA, arXiv:2402.02834)
    taylor       Σ |w ∂L/∂w| over the block's linears (the same; its code counts norms too)
    random       the baseline

Blocks are ranked once and the least removed together; the rest are renumbered.
Cost: influence and taylor one pass (taylor backwards too), perplexity L²/2 passes of a block.

Legend: L blocks, B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.transform import Findings, Outline, Survey, Visit
from pocketlm.core.views import BlockView
from pocketlm.prune.smaller import FewerBlocks

SCORE = "score"


class Depth(FewerBlocks):
    """Depth pruning: removes the blocks that matter least.

    Attributes:
        score: What says how much a block matters.
        keep_first: Blocks at the start that are never removed.
        keep_last: Blocks at the end that are never removed.
        seed: Of the random score.
    """

    score: Literal["influence", "perplexity", "taylor", "random"] = "influence"
    keep_first: int = Field(default=0, ge=0)
    keep_last: int = Field(default=0, ge=0)
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read."""
        return self.score != "random"

    def measure(self, survey: Survey) -> Findings:
        """A score for each block; the least are removed."""
        if self.score == "influence":
            return survey.visit(_influence)
        if self.score == "taylor":
            return survey.gradients(_taylor)
        if self.score == "perplexity":
            return [{SCORE: loss} for loss in survey.removal_losses()]
        generator = torch.Generator().manual_seed(self.seed)
        return [{SCORE: s} for s in torch.rand(survey.outline.blocks, generator=generator)]

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The model without its least blocks.

        Raises:
            ConfigError: If every block would be removed, or too many are protected.
        """
        total = outline.blocks
        free = range(self.keep_first, total - self.keep_last)
        count = self.count(total, len(free))
        scores = [0.0] * total if findings is None else [float(f[SCORE]) for f in findings]
        removed = set(sorted(free, key=lambda index: (scores[index], index))[:count])
        return outline.keep_blocks([index for index in range(total) if index not in removed])


class Shortgpt(Depth):
    """ShortGPT: removes the blocks whose output is most like their input."""

    score: Literal["influence"] = "influence"


def _influence(visit: Visit) -> dict[str, Tensor]:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for before_BTD, after_BTD in visit.run():
        cosine_BT = F.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        total += cosine_BT.double().sum().cpu()
        tokens += cosine_BT.numel()
    return {SCORE: 1 - total / tokens}


def _taylor(index: int, block: BlockView, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for name, gradient_OI in gradients.items():
        total += (block.linears[name].weight_OI() * gradient_OI).abs().sum().double().cpu()
    return {SCORE: total}
