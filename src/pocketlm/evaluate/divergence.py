"""Per-token figures from two sets of logits, float32 log-softmax throughout.

NLL = -log q(next token);  KL(p‖q) = Σ_v p(v) (log p(v) - log q(v)), p the original, q the model.

Legend: P positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What is kept of some positions once their logits are gone; all [P], on the CPU.

    Attributes:
        nll: Nats of the token that followed, float64.
        top: The likeliest token, int64.
        base_nll: The original's; None without an original.
        base_top: The original's.
        kl: KL(original ‖ model) in nats, float64.
    """

    nll: Tensor
    top: Tensor
    base_nll: Tensor | None = None
    base_top: Tensor | None = None
    kl: Tensor | None = None


def score_tokens(
    logits_PV: Tensor, next_P: Tensor, base_logits_PV: Tensor | None = None
) -> TokenScores:
    """Scores some positions.

    Args:
        logits_PV: The model's, float32 [P, V].
        next_P: The token that followed each position, int64 [P], on the same device.
        base_logits_PV: The original's, same shape and device.

    Returns:
        One figure a position. A KL that rounding made negative is 0.
    """
    logq_PV = torch.log_softmax(logits_PV.float(), dim=-1)
    nll, top = _nll(logq_PV, next_P), logq_PV.argmax(-1).cpu()
    if base_logits_PV is None:
        return TokenScores(nll, top)
    logp_PV = torch.log_softmax(base_logits_PV.float(), dim=-1)
    base_nll, base_top = _nll(logp_PV, next_P), logp_PV.argmax(-1).cpu()
    # in place: the difference is the only further [P, V] tensor beside p itself
    kl_P = logq_PV.neg_().add_(logp_PV).mul_(logp_PV.exp_()).sum(-1)
    return TokenScores(nll, top, base_nll, base_top, kl_P.double().clamp_min(0).cpu())


def _nll(log_probabilities_PV: Tensor, next_P: Tensor) -> Tensor:
    return -log_probabilities_PV.gather(1, next_P[:, None])[:, 0].double().cpu()
