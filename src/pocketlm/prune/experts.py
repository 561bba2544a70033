"""Fewer experts in every mixture: the least are dropped, or merged into those that are like them.

    output   mean over an expert's tokens of g(x) |f(x)|₂   (REAP, arXiv:2510.13999)
    weight   Σ g(x), the weight that the router gives it
    count    tokens routed to it

With `merge`, each expert that goes is averaged into the remaining one whose weights are most like
its own (cosine), in proportion to their tokens (M-SMoE, arXiv:2310.01334); the router
keeps the rows of those that stay.
Deviation: M-SMoE groups by the router's logits and first brings the experts' inner channels into
one order. Experts that were copied from one dense model share that order; others may not.

Legend: E experts, n tokens of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.transform import EXPERTS, Findings, Outline, Structure, Survey, Visit
from pocketlm.core.views import BlockView
from pocketlm.prune.smaller import Smaller, by_block, with_note


class Experts(Smaller):
    """Removes the experts that contribute least to a mixture, or merges them into others.

    Attributes:
        ratio: Share of the experts to remove, rounded to whole experts.
        keep: How many to keep in each mixture, instead of a ratio.
        score: What says how much an expert contributes.
        merge: Whether what goes is averaged into what stays.
    """

    ratio: float = Field(default=0.25, ge=0.0, lt=1.0)
    keep: int | None = Field(default=None, ge=1)
    score: Literal["output", "weight", "count"] = "output"
    merge: bool = False

    def measure(self, survey: Survey) -> Findings:
        """A score for each expert, its tokens, and where experts are merged, how alike they are."""
        of_block = by_block(survey.outline.structures(EXPERTS))
        return survey.visit(lambda visit: self._look(visit, of_block.get(visit.index, ())))

    def _look(self, visit: Visit, structures: Sequence[Structure]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for one in structures:  # a block has one mixture
            sums_3E = torch.zeros(3, one.units, dtype=torch.float64)

            def take(
                path: str, expert: int, weight_n: Tensor, size_n: Tensor, sums: Tensor = sums_3E
            ) -> None:
                told = (size_n.sum(), weight_n.sum(), torch.tensor(float(len(weight_n))))
                sums[:, expert] += torch.stack([value.double().cpu() for value in told])

            visit.block.watch_experts(take)
            for _ in visit.run():
                pass
            visit.block.watch_experts(None)
            output_E, weight_E, count_E = sums_3E
            scores = {
                "output": output_E / count_E.clamp_min(1), "weight": weight_E, "count": count_E,
            }  # fmt: skip
            found[f"{one.path}.score"] = scores[self.score]
            found[f"{one.path}.count"] = count_E
            if self.merge:
                found[f"{one.path}.alike"] = _likeness(one, visit.block)
        return found

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The model with fewer experts.

        Raises:
            ConfigError: If none, or fewer than a token takes, would be left.
        """
        kept: dict[str, list[Mapping[int, float]]] = {}
        unreached = 0
        for one in outline.structures(EXPERTS):
            count = one.units - round(self.ratio * one.units) if self.keep is None else self.keep
            if not 1 <= count <= one.units:
                raise ConfigError(
                    f"{count} of {one.units} experts would be left.",
                    where=one.path,
                    remedy="Lower ratio, or keep no more than there are.",
                )
            seen = {} if findings is None else findings[one.block]
            scores_E = seen.get(f"{one.path}.score", torch.zeros(one.units))
            counts_E = seen.get(f"{one.path}.count", torch.ones(one.units))
            alike_EE = seen.get(f"{one.path}.alike")
            unreached += int((counts_E == 0).sum())
            order = torch.sort(scores_E, descending=True, stable=True).indices
            stay = sorted(order[:count].tolist())
            kept[one.path] = _groups(stay, counts_E, alike_EE)
        changes = outline.keep_experts(kept)
        if not unreached:
            return changes
        note = f"no calibration token reached {unreached} experts: they counted for nothing."
        return with_note(changes, note)


def _groups(
    stay: list[int], counts_E: Tensor, alike_EE: Tensor | None
) -> list[Mapping[int, float]]:
    """What each expert that stays is made of, itself first."""
    if alike_EE is None:
        return [{expert: 1.0} for expert in stay]
    groups = {expert: [expert] for expert in stay}
    for expert in range(len(counts_E)):
        if expert not in groups:
            best = int(alike_EE[expert, stay].argmax())
            groups[stay[best]].append(expert)
    made: list[Mapping[int, float]] = []
    for members in groups.values():
        tokens = counts_E[members].double()
        total = float(tokens.sum())
        shares = (tokens / total).tolist() if total else [1.0] + [0.0] * (len(members) - 1)
        made.append(dict(zip(members, shares, strict=True)))
    return made


def _likeness(structure: Structure, block: BlockView) -> Tensor:
    """Cosine between the experts' weights, all linears of an expert together, [E, E]."""
    each = len(structure.readers) // structure.units
    gram_EE = torch.zeros(structure.units, structure.units, dtype=torch.float64)
    for place in range(each):
        rows = [
            block.linears[name].weight_OI().flatten() for name in structure.readers[place::each]
        ]
        gram_EE += (torch.stack(rows) @ torch.stack(rows).T).double().cpu()
    size_E = gram_EE.diagonal().sqrt().clamp_min(1e-30)
    return gram_EE / size_E / size_E[:, None]
