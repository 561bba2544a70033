"""Which weights are compared with each other, and which of them stay.

Legend: O output rows, I input columns, M neighbours of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketlm.core.stored import SparsitySpec

Scope = Literal["row", "matrix"]


def kept(
    score_OI: Float[Tensor, "o i"], sparsity: SparsitySpec, scope: Scope = "row"
) -> Bool[Tensor, "o i"]:
    """The mask that keeps the best weights.

    Args:
        score_OI: What each weight is worth.
        sparsity: How many go; N:M is always of neighbours in a row.
        scope: Whether weights compete within their row or within the whole matrix.

    Returns:
        True for what stays. The count is exact; of equal scores the later ones stay.
    """
    rows, columns = score_OI.shape
    if sparsity.of is not None:
        grouped = score_OI.reshape(-1, sparsity.of)
    else:
        grouped = score_OI if scope == "row" else score_OI.reshape(1, -1)
    gone = sparsity.pruned(grouped.shape[1])
    if grouped.is_cuda and sparsity.of is not None:
        return (ranks(grouped) >= gone).view(rows, columns)
    mask = torch.ones_like(grouped, dtype=torch.bool)
    if gone:
        least = torch.argsort(grouped, dim=1, stable=True)[:, :gone]
        mask.scatter_(1, least, False)
    return mask.view(rows, columns)


def ranks(score_NM: Tensor) -> Tensor:
    """Each score's place in its group, from the least; of equal ones the earlier comes first.

    Comparing all pairs of a few is what a GPU does faster than sorting them.
    """
    place_M = torch.arange(score_NM.shape[1], device=score_NM.device)
    earlier_MM = place_M[None, :] < place_M[:, None]
    one_NM1, other_N1M = score_NM[:, :, None], score_NM[:, None, :]
    return ((other_N1M < one_NM1) | ((other_N1M == one_NM1) & earlier_MM)).sum(-1)
