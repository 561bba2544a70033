"""The inverse factor of a Hessian, with a ladder for matrices that are not positive definite.

Legend: I input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.errors import NumericError

LADDER = 4  # rungs of ten times more damping before float64 is tried


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with H⁻¹ = UᵀU, and what it took to get it.

    Attributes:
        upper_II: U, float32.
        damping: Share of the mean diagonal that was added.
        rung: "" for the first try, else the name of the rung that held.
    """

    upper_II: Tensor
    damping: float
    rung: str


def inverse_factor(hessian_II: Float[Tensor, "i i"], damping: float) -> InverseFactor:
    """Factorises the inverse of a damped Hessian without forming the inverse.

    With J the reversal of the columns, J H J = L Lᵀ, so H = V Vᵀ for the upper triangular
    V = J L J, and U = V⁻¹. One factorisation and one triangular solve; GPTQ's reference
    (arXiv:2210.17323, algorithm 1) takes two factorisations and an inverse.

    Args:
        hessian_II: Symmetric, positive semidefinite up to rounding.
        damping: Share of the mean diagonal to add at first.

    Returns:
        U in float32; damping and rung as they came out.

    Raises:
        NumericError: If a value is not finite, or no rung held.
    """
    if not torch.isfinite(hessian_II).all():
        raise NumericError(
            "the Hessian holds NaN or Inf.", remedy="Check the calibration text and the weights."
        )
    for rung in range(LADDER):
        upper_II = _factor(hessian_II, damping * 10**rung)
        if upper_II is not None:
            share = damping * 10**rung
            return InverseFactor(upper_II, share, "" if rung == 0 else f"damping x{10**rung}")
    upper_II = _factor(hessian_II.double(), damping)
    if upper_II is not None:
        return InverseFactor(upper_II.float(), damping, "float64")
    values_I, vectors_II = torch.linalg.eigh(hessian_II.double())
    floor = max(damping, 1e-6) * float(values_I.clamp(min=0).mean())
    clipped_II = (vectors_II * values_I.clamp(min=floor)) @ vectors_II.T
    upper_II = _factor(clipped_II, damping) if floor > 0 else None
    if upper_II is not None:
        return InverseFactor(upper_II.float(), damping, "eigenvalues clipped")
    raise NumericError(
        "the Hessian stayed singular on every rung (damping, float64, eigenvalue clipping).",
        remedy="Use more calibration samples, or a method without Hessians such as rtn.",
    )


def _factor(hessian_II: Tensor, damping: float) -> Tensor | None:
    diagonal_I = hessian_II.diagonal()
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(damping * diagonal_I.mean())
    lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if int(failed):
        return None
    identity_II = torch.eye(len(diagonal_I), dtype=damped_II.dtype, device=damped_II.device)
    upper_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
    return upper_II if bool(torch.isfinite(upper_II).all()) else None
