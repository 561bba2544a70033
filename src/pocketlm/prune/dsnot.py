"""DSnoT: kept and pruned weights change places until a row's expected output is the old one.

With e = Σ over pruned w_i E[x_i], what a row's mean output has lost (arXiv:2310.08915, section 3):
    grow   the pruned weight of largest  sign(e) · w_i E[x_i] / Var[x_i];
    prune  the kept weight of least |w_i| · |x_i|₂ among those with  sign(e) · w_i E[x_i] < 0.
Each turn changes one pair in every row; a row stops once |e| is small or no turn brings it nearer.
No weight changes its value. N:M: both of a pair lie in one group.

Deviation: small is a tenth of where a row began; the paper's 0.1 is absolute, and so depends on the
scale of the model's activations.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketlm.core.stored import SparsitySpec
from pocketlm.prune.moments import Moments


def exchange(
    weight_OI: Float[Tensor, "o i"],
    mask_OI: Bool[Tensor, "o i"],
    moments: Moments,
    norm_I: Float[Tensor, " i"],
    sparsity: SparsitySpec,
    turns: int = 50,
    enough: float = 0.1,
) -> Bool[Tensor, "o i"]:
    """Lets weights change places.

    Args:
        weight_OI: The weight.
        mask_OI: Where to start.
        moments: Of the inputs.
        norm_I: |x_i|₂ of each input, up to a factor.
        sparsity: Says whether pairs must lie in one group.
        turns: At most, for each row.
        enough: |e| below this share of where it began ends a row.

    Returns:
        A mask of as many weights in every row.
    """
    mask_OI = mask_OI.clone()
    rows = torch.arange(len(weight_OI), device=weight_OI.device)
    share_OI = weight_OI * moments.mean_I().float()
    gain_OI = share_OI / moments.variance_I().float().clamp(min=1e-12)
    size_OI = weight_OI.abs() * norm_I
    never = torch.tensor(float("inf"), device=weight_OI.device)
    lost_O = (share_OI * ~mask_OI).sum(1)
    limit_O, live_O = enough * lost_O.abs(), torch.ones_like(lost_O, dtype=torch.bool)
    for _ in range(turns):
        sign_O1 = lost_O.sign()[:, None]
        grown_O = torch.where(mask_OI, -never, sign_O1 * gain_OI).argmax(1)
        allowed_OI = mask_OI & (sign_O1 * share_OI < 0)
        if sparsity.of is not None:
            group_I = torch.arange(mask_OI.shape[1], device=mask_OI.device) // sparsity.of
            allowed_OI &= group_I == (grown_O // sparsity.of)[:, None]
        gone_O = torch.where(allowed_OI, size_OI, never).argmin(1)
        after_O = lost_O - share_OI[rows, grown_O] + share_OI[rows, gone_O]
        possible_O = allowed_OI.any(1) & ~mask_OI[rows, grown_O]
        live_O &= possible_O & (lost_O.abs() > limit_O) & (after_O.abs() < lost_O.abs())
        if not bool(live_O.any()):
            break
        at = rows[live_O]
        mask_OI[at, grown_O[live_O]] = True
        mask_OI[at, gone_O[live_O]] = False
        lost_O = torch.where(live_O, after_O, lost_O)
    return mask_OI
