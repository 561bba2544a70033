"""The inverse factor of a Hessian, with a ladder for matrices that are not positive definite; the
largest singular values of a matrix; products on a GPU's tensor cores.

Legend: I input columns, O rows, R rank, P rank and a few more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.errors import NumericError

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
LADDER = 4  # rungs of ten times more damping before float64 is tried
SOLVED_SIDE = 512  # triangles up to this are inverted at once, larger ones by halves
SPLIT_COLUMNS = 2048  # of a factor that are split into bfloat16 at once
EXACT_SIDE = 1536  # matrices whose shorter side is at most this are decomposed exactly
OVERSAMPLING = 32  # directions beyond the rank that a randomised decomposition looks at
POWER_ITERATIONS = 4


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
    if not torch.isfinite(torch.stack(torch.aminmax(hessian_II))).all():
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
    damped_II = hessian_II.flip(0, 1)
    damped_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    # In place: matrices of 14336 columns take 0.8 GB each. What is symmetric is its transpose, and
    # that lies as the factorisation wants it.
    lower_II, failed = damped_II.mT, torch.empty((), dtype=torch.int32, device=damped_II.device)
    torch.linalg.cholesky_ex(lower_II, out=(lower_II, failed))
    if int(failed):
        return None
    upper_II = lower_II.flip(0, 1)
    del damped_II, lower_II
    if upper_II.is_cuda:  # 1.6 times as fast there, and in place
        invert_upper(upper_II)
    else:
        identity_II = torch.eye(len(upper_II), dtype=upper_II.dtype)
        upper_II = torch.linalg.solve_triangular(upper_II, identity_II, upper=True)
    return upper_II if bool(torch.isfinite(upper_II.sum())) else None


def invert_upper(upper_II: Tensor) -> None:
    """Replaces an upper triangular matrix by its inverse, by halves:

    [A B; 0 D]⁻¹ = [A⁻¹  -A⁻¹ B D⁻¹; 0  D⁻¹],  n³ / 3 operations, nearly all in products.
    """
    columns = len(upper_II)
    if columns <= SOLVED_SIDE:
        identity_II = torch.eye(columns, dtype=upper_II.dtype, device=upper_II.device)
        upper_II.copy_(torch.linalg.solve_triangular(upper_II, identity_II, upper=True))
        return
    half = columns // 2
    invert_upper(upper_II[:half, :half])
    invert_upper(upper_II[half:, half:])
    beside = upper_II[:half, half:]
    beside.copy_(-(upper_II[:half, :half] @ beside @ upper_II[half:, half:]))


def product(left: Tensor, right: Tensor, *, terms: Literal[1, 3] = 3) -> Tensor:
    """A product of float32 matrices; on a GPU by its tensor cores, summed in float32.

    With a₁ the bfloat16 nearest to a and a₂ that nearest to a - a₁, three terms are
    a₁b₁ + a₁b₂ + a₂b₁: an error of about 2^-17 of each product (Markidis and others,
    arXiv:1803.04014, section V), at a third of the time of float32. One term is a₁b₁, 2^-9.

    Args:
        left: [M, K]; with one term perhaps bfloat16.
        right: [K, N]; alike.
        terms: 3, or 1 where the result is only compared with others alike.
    """
    if not left.is_cuda or left.dtype == torch.float64:
        return left @ right
    left_high = left.bfloat16()
    if terms == 1:
        return torch.mm(left_high, right.bfloat16(), out_dtype=torch.float32)
    left_low = (left - left_high).bfloat16()
    result = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    for start in range(0, right.shape[1], SPLIT_COLUMNS):  # a large factor is not held thrice
        stop = start + SPLIT_COLUMNS
        part, into = right[:, start:stop], result[:, start:stop]
        high = part.bfloat16()
        low = (part - high).bfloat16()
        into.copy_(torch.mm(left_high, high, out_dtype=torch.float32))
        for a, b in ((left_high, low), (left_low, high)):
            torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    return result


def truncated_svd(
    matrix_OI: Float[Tensor, "o i"], rank: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors.

    Exact where the shorter side is at most 1536 or the rank is more than a quarter of it. Else
    randomised subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and
    5.1) with 4 power iterations and 32 directions more than asked for: its error exceeds the least
    possible one by a factor that falls with the power of the iterations.

    Args:
        matrix_OI: Float32 or float64.
        rank: R, from 1 to the shorter side.
        seed: Of the random directions; the same seed gives the same result.

    Returns:
        Left vectors [O, R], singular values [R] in falling order, right vectors [R, I].

    Raises:
        NumericError: If a value is not finite, or the decomposition does not converge.
    """
    if not torch.isfinite(matrix_OI).all():
        raise NumericError(
            "the matrix to factorise holds NaN or Inf.",
            remedy="Check the calibration text and the weights.",
        )
    shorter = min(matrix_OI.shape)
    if shorter > EXACT_SIDE and 4 * rank <= shorter:
        left_OR, values_R, right_RI = _randomised(matrix_OI, rank, seed)
    else:
        left_OR, values_R, right_RI = _exact(matrix_OI)
    return left_OR[:, :rank], values_R[:rank], right_RI[:rank]


def _exact(matrix_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular values; in float64 where float32 does not converge."""
    try:
        return torch.linalg.svd(matrix_OI, full_matrices=False)
    except LinAlgError:
        pass
    try:
        parts = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    except LinAlgError as error:
        raise NumericError(
            "the singular value decomposition does not converge.",
            remedy="Leave the layer out with --ignore.",
        ) from error
    left_OR, values_R, right_RI = (part.to(matrix_OI.dtype) for part in parts)
    return left_OR, values_R, right_RI


def _randomised(matrix_OI: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = min(rank + OVERSAMPLING, *matrix_OI.shape)
    start_IP = torch.randn(matrix_OI.shape[1], wide, generator=generator)
    basis_OP = torch.linalg.qr(matrix_OI @ start_IP.to(matrix_OI)).Q
    for _ in range(POWER_ITERATIONS):
        turned_IP = torch.linalg.qr(matrix_OI.T @ basis_OP).Q
        basis_OP = torch.linalg.qr(matrix_OI @ turned_IP).Q
    inner_PP, values_P, right_PI = _exact(basis_OP.T @ matrix_OI)
    return basis_OP @ inner_PP, values_P, right_PI
