"""ALPS: the mask by ADMM on the layer's error, then the best weights under it (arXiv:2406.07831).

    minimise over W   tr (W - Ŵ) H (W - Ŵ)ᵀ   such that W keeps so many weights

In columns scaled to H_ii = 1, with D the pruned copy, V the multiplier and ρ the penalty (eq. 4-5):
    W = (Ŵ H + ρ D - V) (H + ρ)⁻¹,   D = keep(W + V / ρ),   V += ρ (W - D).
ρ rises with how many places of the mask have changed in the last rounds (section 3.2); when none
has, the mask stands. The weights under it solve their normal equations by conjugate gradients, all
rows at once (section 3.3).

Deviation: the authors' code begins anew with a smaller ρ where the first rounds move nothing; here
the mask stands then.

One eigendecomposition serves all ρ. Cost: two products [O, I] x [I, I] a round, one a step of the
gradients.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketlm.core.stored import SparsitySpec
from pocketlm.prune.patterns import Scope, kept

EVERY = 3  # rounds between two looks at how much the mask moves
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # places that changed over those kept → growth of ρ


def alternate(
    weight_OI: Float[Tensor, "o i"],
    hessian_II: Float[Tensor, "i i"],
    sparsity: SparsitySpec,
    scope: Scope = "matrix",
    rounds: int = 300,
    start: float = 0.1,
) -> Bool[Tensor, "o i"]:
    """The mask that ADMM settles on.

    Args:
        weight_OI: Ŵ, float32.
        hessian_II: H, damped or shrunk so that it is positive definite.
        sparsity: How many weights go.
        scope: Which weights compete where the sparsity is a share.
        rounds: At most.
        start: ρ at first, in units of the scaled diagonal.

    Returns:
        True for what stays.
    """
    size_I = hessian_II.diagonal().clamp(min=torch.finfo(hessian_II.dtype).tiny).sqrt()
    scaled_II = hessian_II / size_I[:, None] / size_I
    target_OI = weight_OI * size_I
    values_I, vectors_II = torch.linalg.eigh(scaled_II)
    right_OI = target_OI @ scaled_II
    dual_OI = torch.zeros_like(target_OI)
    mask_OI = kept(target_OI.abs(), sparsity, scope)
    pruned_OI = target_OI * mask_OI
    rho, earlier_OI = start, mask_OI
    for done in range(1, rounds + 1):
        moved_OI = (right_OI + rho * pruned_OI - dual_OI) @ vectors_II
        moved_OI = (moved_OI / (values_I + rho)) @ vectors_II.T
        asked_OI = moved_OI + dual_OI / rho
        mask_OI = kept(asked_OI.abs(), sparsity, scope)
        pruned_OI = asked_OI * mask_OI
        dual_OI += rho * (moved_OI - pruned_OI)
        if done % EVERY == 0:
            changed = int((mask_OI != earlier_OI).sum())
            if not changed:
                break
            share = changed / max(int(mask_OI.sum()), 1)
            rho *= next(growth for least, growth in GROWTH if share >= least)
            earlier_OI = mask_OI
    return mask_OI


def solve(
    weight_OI: Float[Tensor, "o i"],
    hessian_II: Float[Tensor, "i i"],
    mask_OI: Bool[Tensor, "o i"],
    start_OI: Float[Tensor, "o i"] | None = None,
    steps: int = 20,
) -> Float[Tensor, "o i"]:
    """The weights under a mask that come closest to a weight in the layer's output.

    Conjugate gradients on each row's normal equations, in columns scaled to a diagonal of ones.

    Args:
        weight_OI: What to come close to, float32.
        hessian_II: H, positive definite.
        mask_OI: What may differ from zero.
        start_OI: Where to start; None: the masked weight.
        steps: Of the gradients.

    Returns:
        Weights of no larger error than the start's.
    """
    size_I = hessian_II.diagonal().clamp(min=torch.finfo(hessian_II.dtype).tiny).sqrt()
    scaled_II = hessian_II / size_I[:, None] / size_I
    target_OI = weight_OI * size_I
    found_OI = (weight_OI if start_OI is None else start_OI) * size_I * mask_OI
    rest_OI = ((target_OI - found_OI) @ scaled_II) * mask_OI
    along_OI, size_O = rest_OI, rest_OI.square().sum(1)
    for _ in range(steps):
        moved_OI = (along_OI @ scaled_II) * mask_OI
        curve_O = (along_OI * moved_OI).sum(1)
        step_O = torch.where(curve_O > 0, size_O / curve_O, 0.0)
        found_OI = found_OI + step_O[:, None] * along_OI
        rest_OI = rest_OI - step_O[:, None] * moved_OI
        new_O = rest_OI.square().sum(1)
        turn_O = torch.where(size_O > 0, new_O / size_O, 0.0)
        along_OI, size_O = rest_OI + turn_O[:, None] * along_OI, new_O
    return found_OI / size_I * mask_OI
