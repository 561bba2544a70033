"""LaCo (arXiv:2402.11187): neighbouring blocks are collapsed into one.

Merging blocks l+1 … l+m into block l:    θ*_l = θ_l + Σ_k (θ_{l+k} - θ_l)        (eq. 1)

From the top down, as many blocks as `merge` are merged at a time; a merge stays if the last hidden
states keep a mean cosine of `threshold` to the original's, and the window moves on by `interval`,
else by one block (algorithm 1).

Deviations: the paper ends with as many blocks as its threshold leaves; here the threshold falls
until the asked number is gone. Where a merge is too much, fewer blocks are tried at the same place:
θ_l enters a merge of m with the factor 1 - m, which a small model whose blocks differ does not
survive; m = 1 puts the next block in its place, no more. Blocks that others were merged into are
not merged again. The cosine is that of single tokens, not of whole sequences.

Cost: a pass of the model over a few windows for each merge that is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from pydantic import Field

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.transform import Findings, Outline, Survey
from pocketlm.prune.smaller import FewerBlocks

HOME = "home"


class Laco(FewerBlocks):
    """LaCo: merges runs of neighbouring blocks instead of removing them.

    Attributes:
        merge: Blocks that go into one at a time, at most.
        threshold: Cosine that a merge must keep at first.
        fall: By how much the threshold falls where no merge keeps it.
        interval: Blocks between two merges that stay.
    """

    merge: int = Field(default=3, ge=1)
    threshold: float = Field(default=0.75, gt=0.0, lt=1.0)
    fall: float = Field(default=0.1, gt=0.0)
    interval: int = Field(default=2, ge=1)

    def measure(self, survey: Survey) -> Findings:
        """The block that each block ends up in, itself where it stays."""
        total = survey.outline.blocks
        asked = left = self.count(total, total - 1)
        threshold = self.threshold
        home = tuple(range(total))

        @cache  # a falling threshold asks again
        def cosine(place: tuple[int, ...]) -> float:
            return survey.distance(_merged(survey.outline, place))

        while left:
            before = left
            start = total - 2
            while start >= 0 and left:
                tries = (
                    self._tried(home, start, size) for size in range(min(self.merge, left), 0, -1)
                )
                found = next((t for t in tries if t and cosine(t) >= threshold), None)
                if found:
                    gone = sum(block != place for block, place in enumerate(found))
                    home, left = found, asked - gone
                start -= self.interval if found else 1
            if left == before:
                threshold -= self.fall
            if threshold < -1:  # every merge that is possible has been made
                raise ConfigError(
                    f"{left} more blocks find no neighbour that is not merged already.",
                    where="laco",
                    remedy="Lower ratio or blocks, or change merge.",
                )
        return [{HOME: torch.tensor(place)} for place in home]

    def _tried(self, home: tuple[int, ...], start: int, size: int) -> tuple[int, ...] | None:
        """Where each block goes if the next `size` after `start` join it; None if they cannot."""
        run = [b for b in range(start + 1, len(home)) if home[b] == b][:size]
        joined = [b for b in range(len(home)) if home[b] in run]
        if home[start] != start or len(run) < size or joined != run:
            return None
        return tuple(start if block in run else place for block, place in enumerate(home))

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The model with its merged blocks.

        Raises:
            ConfigError: If every block would be merged away.
        """
        total = outline.blocks
        last = total - 1 - self.count(total, total - 1)
        if findings is None:
            return _merged(outline, [min(block, last) for block in range(total)])
        return _merged(outline, [int(one[HOME]) for one in findings])


def _merged(outline: Outline, home: Sequence[int]) -> Changes:
    kept = [block for block, place in enumerate(home) if block == place]
    others: dict[int, Mapping[int, float]] = {}
    for block in kept:
        mine = {b: 1.0 for b, place in enumerate(home) if place == block and b != block}
        if mine:
            others[block] = mine
    return outline.keep_blocks(kept, others)
