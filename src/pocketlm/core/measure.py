"""How far a compressed weight is from its original, in what the linear outputs.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pocketlm.core.linalg import product


def relative_error(
    reference_OI: Float[Tensor, "o i"],
    current_OI: Float[Tensor, "o i"],
    hessian_II: Float[Tensor, "i i"] | None,
) -> float:
    """|(W - Q) X|² / |W X|², from the Hessian of the inputs; of the bare weights without one.

    Args:
        reference_OI: W.
        current_OI: Q, decoded.
        hessian_II: XXᵀ up to a factor; None, or zeros, where no inputs were seen.

    Returns:
        The relative squared error; 0.0 for an all-zero reference that is kept exactly.
    """
    difference_OI = current_OI - reference_OI
    if hessian_II is None or not bool((hessian_II.diagonal() > 0).any()):
        lost, whole = difference_OI.square().sum(), reference_OI.square().sum()
    else:
        lost = (product(difference_OI, hessian_II) * difference_OI).sum()
        whole = (product(reference_OI, hessian_II, terms=1) * reference_OI).sum()
    return float(lost / whole) if float(whole) > 0 else float(lost)
