"""The best factors of a given rank, in a metric of the inputs.

|(W - L R) X|² is least where L R is W S, truncated to its largest singular values, times S⁻¹, for
any S with S Sᵀ = XXᵀ (Eckart and Young in the metric of the inputs). A diagonal S takes the inputs
for uncorrelated, S = 1 for uncorrelated and of equal size.

The singular values are shared out evenly, L = U √Σ and R = √Σ Vᵀ S⁻¹: both factors have similar
ranges, which 16 bits and integer grids hold best.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.factored import LowRank
from pocketlm.core.linalg import truncated_svd
from pocketlm.core.state import LinearState, Note
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import Dense

FLOOR = 1e-4  # the least scale of an input, over the largest: one without input costs nothing


@runtime_checkable
class Metric(Protocol):
    """A square root S of how much the inputs weigh."""

    def weigh(self, weight_OI: Tensor) -> Tensor:
        """W S."""
        ...

    def unweigh(self, right_RI: Tensor) -> Tensor:
        """V S⁻¹."""
        ...


@dataclass(frozen=True)
class Plain:
    """S = 1."""

    def weigh(self, weight_OI: Tensor) -> Tensor:
        """W."""
        return weight_OI

    def unweigh(self, right_RI: Tensor) -> Tensor:
        """V."""
        return right_RI


@dataclass(frozen=True)
class Diagonal:
    """S = diag(s), its smallest values raised to a ten-thousandth of the largest.

    Attributes:
        scale_I: s, not negative.
    """

    scale_I: Tensor

    def weigh(self, weight_OI: Tensor) -> Tensor:
        """W S."""
        return weight_OI * self._raised()

    def unweigh(self, right_RI: Tensor) -> Tensor:
        """V S⁻¹."""
        return right_RI / self._raised()

    def _raised(self) -> Tensor:
        largest = self.scale_I.amax()
        if not bool(largest > 0):
            return torch.ones_like(self.scale_I)
        return self.scale_I.clamp(min=FLOOR * float(largest))


@dataclass(frozen=True)
class Whitening:
    """S = U⁻¹, for the upper triangular U with H⁻¹ = UᵀU: S Sᵀ = H.

    Attributes:
        upper_II: U, as `Hessian.inverse_factor` gives it.
    """

    upper_II: Tensor

    def weigh(self, weight_OI: Tensor) -> Tensor:
        """W S, by a triangular solve."""
        return torch.linalg.solve_triangular(self.upper_II, weight_OI, upper=True, left=False)

    def unweigh(self, right_RI: Tensor) -> Tensor:
        """V S⁻¹."""
        return right_RI @ self.upper_II


def whitening(
    hessian: Hessian, damping: float, shrinkage: float
) -> tuple[Metric, tuple[Note, ...]]:
    """The metric of some inputs; that of the bare weights where no token came.

    Args:
        hessian: Of the inputs.
        damping: Share of the mean diagonal that is added.
        shrinkage: Share of each column's own diagonal that is added.

    Returns:
        The metric and what is to be told of it.

    Raises:
        NumericError: If no rung of the ladder made the Hessian positive definite.
    """
    if not hessian.reached:
        text = "no calibration token reached it: factorised without data."
        return Plain(), (Note("no_tokens", text),)
    factor = hessian.inverse_factor(damping, None, shrinkage)
    if not factor.rung:
        return Whitening(factor.upper_II), ()
    text = f"the Hessian was not positive definite; what held: {factor.rung}."
    note = Note("damping", text, {"damping": factor.damping, "rung": factor.rung})
    return Whitening(factor.upper_II), (note,)


def best_factors(
    weight_OI: Float[Tensor, "o i"], rank: int, metric: Metric
) -> tuple[Tensor, Tensor]:
    """The factors that lose least in a metric.

    Args:
        weight_OI: W, float32.
        rank: R.
        metric: What a column weighs.

    Returns:
        L [O, R] and R [R, I].

    Raises:
        NumericError: If the weight or the metric is not finite.
    """
    left_OR, values_R, right_RI = truncated_svd(metric.weigh(weight_OI), rank)
    root_R = values_R.sqrt()
    return left_OR * root_R, root_R[:, None] * metric.unweigh(right_RI)


def stored(left_OR: Tensor, right_RI: Tensor, dtype: torch.dtype) -> LowRank:
    """The factors as they are stored in 16 bits."""
    return LowRank(Dense(left_OR.to(dtype)), Dense(right_RI.to(dtype)))


def factorised(state: LinearState, rank: int | None, metric: Metric) -> LinearState:
    """A linear as its best factors in a metric; as it was where it is given no rank."""
    if rank is None:
        return left_alone(state)
    left_OR, right_RI = best_factors(state.reference_OI, rank, metric)
    return state.with_current(stored(left_OR, right_RI, state.scale_dtype))


def left_alone(state: LinearState) -> LinearState:
    """A linear that a step does not factorise: as earlier steps left it, else its own values."""
    return state if state.current is not None else state.with_current(Dense(state.reference_OI))


def factor_flops(rows: int, columns: int) -> float:
    """Operations of a whole singular value decomposition, about 14 n² m for the shorter side n."""
    shorter, longer = min(rows, columns), max(rows, columns)
    return 14.0 * shorter * shorter * longer
