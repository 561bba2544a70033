"""Channel permutation for N:M: channels change places so that groups lose less.

N:M keeps N of every M neighbours, however the weights that matter lie. The order of FFN channels is
free: whatever writes them is reordered with what reads them, and the model computes the same. For
the reader, with scores |w| · |x|₂ (Wanda's), the order shall keep much score under N:M
(RIA, arXiv:2402.17946, its two steps):

deal     columns sorted by summed score are dealt out to the groups, there and back by turns;
assign   for each of the M places in turn, the columns there are assigned anew to the groups so
         that the kept score is largest: a linear sum assignment, where a column x next to others,
         the N-th largest of which is t, adds max(x, t) in each row.

Deviations: assignments are of 256 groups at a time. Only FFN channels are reordered, so that any
engine runs the result: what reads the stream between blocks (q, k, v, gate, up) shares one order
with all blocks, and the paper permutes its inputs while the model runs.

Cost: one pass, then about 256 M looks at each reading weight.
Legend: O output rows, I input columns, G groups, M columns of a group, U units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.stats import Stat
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.transform import CHANNELS, Findings, Outline, Structure, Survey, Visit
from pocketlm.prune.moments import Moments
from pocketlm.prune.patterns import kept
from pocketlm.prune.smaller import Smaller, by_block
from pocketlm.prune.width import gather

AT_ONCE = 256  # groups of one assignment
ORDER, SHARE = "order", "share"


class Permute(Smaller):
    """Reorders FFN channels so that N:M pruning after it loses less; the model stays the same.

    Attributes:
        sparsity: The N:M that follows.
    """

    needs: ClassVar[tuple[type[Stat], ...]] = (Moments,)

    sparsity: SparsitySpec = SparsitySpec(keep=2, of=4)

    @model_validator(mode="after")
    def _of_groups(self) -> Self:
        if self.sparsity.of is None:
            raise ValueError(f"a share such as {self.sparsity.name} has no groups: give N:M")
        return self

    def measure(self, survey: Survey) -> Findings:
        """The new order of each structure's channels, and how much score it keeps."""
        of_block = by_block(survey.outline.structures(CHANNELS))
        return survey.visit(lambda visit: self._look(visit, of_block.get(visit.index, [])))

    def _look(self, visit: Visit, structures: list[Structure]) -> dict[str, Tensor]:
        stats = gather(visit, structures, lambda width, columns, at: Moments(columns, at))
        found: dict[str, Tensor] = {}
        for one in structures:
            scores: list[Tensor] = []
            for name in one.readers:
                size_I = stats[name].norm_I().float()
                size_I = size_I if stats[name].tokens else torch.ones_like(size_I)
                scores.append(visit.block.linears[name].weight_OI().abs() * size_I)
            score_OI = torch.cat(scores)
            self.sparsity.check(score_OI.shape[1], one.readers[0])
            order_I = best_order(score_OI, self.sparsity)
            shares = [kept_share(s, self.sparsity) for s in (score_OI, score_OI[:, order_I])]
            found[f"{one.path}.{ORDER}"] = order_I.cpu()
            found[f"{one.path}.{SHARE}"] = torch.tensor(shares)
        return found

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The same model with its channels in another order.

        Raises:
            UnsupportedLayer: If the groups do not divide the channels.
        """
        orders: dict[str, Tensor] = {}
        shares: list[Tensor] = []
        for one in outline.structures(CHANNELS):
            self.sparsity.check(one.units, one.readers[0] if one.readers else one.path)
            orders[one.path] = torch.arange(one.units)
            if findings is not None:
                orders[one.path] = findings[one.block][f"{one.path}.{ORDER}"]
                shares.append(findings[one.block][f"{one.path}.{SHARE}"])
        changes = outline.cut({CHANNELS: orders})
        edits = tuple(replace(e, account="rotated" if e.account else "") for e in changes.edits)
        summary, detail = f"FFN channels reordered for {self.sparsity.name}", ""
        if shares:
            before, after = torch.stack(shares).mean(0).tolist()
            detail = f"{after:.1%} of the readers' score kept, before {before:.1%}"
        return replace(changes, edits=edits, summary=summary, detail=detail)


def kept_share(score_OI: Tensor, sparsity: SparsitySpec) -> float:
    """How much of a score N:M keeps, from 0 to 1."""
    return float((score_OI * kept(score_OI, sparsity)).sum() / score_OI.sum().clamp(min=1e-30))


def best_order(score_OI: Tensor, sparsity: SparsitySpec) -> Tensor:
    """An order of the columns under which N:M keeps much score, int64 [I].

    Args:
        score_OI: What each weight is worth, not negative.
        sparsity: N:M, its groups dividing the columns.
    """
    assert sparsity.of is not None
    assert sparsity.keep is not None
    dealt_MG = score_OI.sum(0).argsort(descending=True).view(sparsity.of, -1)
    dealt_MG[1::2] = dealt_MG[1::2].flip(1)
    place_GM = dealt_MG.T.contiguous()
    for first in range(0, len(place_GM), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        place_GM[part] = _assigned(score_OI, place_GM[part], sparsity.keep)
    order_I, plain_I = place_GM.flatten(), torch.arange(score_OI.shape[1])
    better = kept_share(score_OI[:, order_I], sparsity) > kept_share(score_OI, sparsity)
    return order_I if better else plain_I.to(order_I)


def _assigned(score_OI: Tensor, place_GM: Tensor, keep: int) -> Tensor:
    """The same columns in the same groups but for one place after the other assigned anew."""
    place_GM = place_GM.clone()
    for m in range(place_GM.shape[1]):
        rest_GM = torch.cat([place_GM[:, :m], place_GM[:, m + 1 :]], dim=1)
        limit_OG = score_OI[:, rest_GM].topk(keep, dim=2).values[..., -1]
        gain_GG = torch.stack(
            [torch.maximum(score_OI[:, c, None], limit_OG).sum(0) for c in place_GM[:, m].tolist()]
        )
        columns, groups = linear_sum_assignment(gain_GG.cpu().numpy(), maximize=True)
        moved_G = place_GM[torch.as_tensor(columns), m]
        place_GM[torch.as_tensor(groups), m] = moved_G
    return place_GM
