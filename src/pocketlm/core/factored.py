"""Weights in two thin factors, alone or beside another; the best left factor for a right one.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.stats import Hessian
from pocketlm.core.stored import LowRankSpec, SumSpec
from pocketlm.core.tensors import Dense, Packed, Sparse


@dataclass(frozen=True)
class LowRank:
    """A weight as the product of two thin ones, W = L R; run as two products.

    Attributes:
        left: L [O, R].
        right: R [R, I].
    """

    left: Dense | Packed
    right: Dense | Packed

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """R, the inner width."""
        return self.right.shape[0]

    @property
    def spec(self) -> LowRankSpec:
        """Rank, and the form of each factor."""
        return LowRankSpec(rank=self.rank, left=self.left.spec, right=self.right.spec)

    @property
    def is_finite(self) -> bool:
        """Whether every value and scale is a number."""
        return self.left.is_finite and self.right.is_finite

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]: the product of the decoded factors in float32, then in `dtype`."""
        work = torch.promote_types(dtype, torch.float32)
        return (self.left.dequantize(work) @ self.right.dequantize(work)).to(dtype)

    def to(self, device: torch.device | str) -> LowRank:
        """The same weight on a device."""
        return LowRank(self.left.to(device), self.right.to(device))

    @property
    def stored_bits(self) -> int:
        """Stored bits of both factors, everything counted."""
        return self.left.stored_bits + self.right.stored_bits


@dataclass(frozen=True)
class Sum:
    """A weight in two parts, W = B + L R, run one beside the other.

    Attributes:
        base: B [O, I].
        low: L R.
    """

    base: Dense | Packed | Sparse
    low: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.low.shape

    @property
    def spec(self) -> SumSpec:
        """The form of both parts."""
        return SumSpec(base=self.base.spec, low=self.low.spec)

    @property
    def is_finite(self) -> bool:
        """Whether every value and scale is a number."""
        return self.base.is_finite and self.low.is_finite

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]: added in float32, then in `dtype`."""
        work = torch.promote_types(dtype, torch.float32)
        return (self.base.dequantize(work) + self.low.dequantize(work)).to(dtype)

    def to(self, device: torch.device | str) -> Sum:
        """The same weight on a device."""
        return Sum(self.base.to(device), self.low.to(device))

    @property
    def stored_bits(self) -> int:
        """Stored bits of both parts, everything counted."""
        return self.base.stored_bits + self.low.stored_bits


def best_left(
    weight_OI: Float[Tensor, "o i"],
    right_RI: Float[Tensor, "r i"],
    hessian: Hessian | None,
    damping: float = 1e-4,
) -> Tensor:
    """The left factor of least |(W - L R) X|² for a given right one.

        L = W H Rᵀ (R H Rᵀ)⁻¹,   H = XXᵀ

    (the first least-squares step of LPLRFactorize in CALDERA, arXiv:2405.18886, algorithm 2).

    Args:
        weight_OI: W, float32.
        right_RI: R.
        hessian: Of the inputs; None, or without a token: |W - L R| is least.
        damping: Share of H's mean diagonal that is added to H.

    Returns:
        L [O, R], float32.
    """
    carried_IR = right_RI.T
    if hessian is not None and hessian.reached:
        matrix_II = hessian.matrix_II()
        matrix_II.diagonal().add_(damping * matrix_II.diagonal().mean())
        carried_IR = matrix_II @ carried_IR
    # The inner matrix is small and may be near singular: float64, and the pseudo-inverse.
    inner_RR = right_RI.double() @ carried_IR.double()
    solved_RR = torch.linalg.pinv((inner_RR + inner_RR.T) / 2, hermitian=True)
    return ((weight_OI @ carried_IR).double() @ solved_RR).to(weight_OI.dtype)
