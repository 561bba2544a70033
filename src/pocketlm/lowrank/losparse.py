"""LoSparse: low rank plus sparse, W ≈ L R + S. Factors hold what weights share, S what stands out.

LoSparse (arXiv:2306.11222) trains both parts while S loses whole neurons. Without training,
both are found by turns, as in OATS (arXiv:2409.13652, alternating thresholding): with the columns
scaled by the size of their inputs, D = diag(√ mean x_i²),
    L R = the best factors of (W - S) D,      S = the largest entries of (W - L R) D.

Deviation: S keeps single weights, the same number in every row, instead of whole columns. The
metric of L R is D too, or the inputs' whole Hessian (`whitening`).

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pocketlm.core.factored import Sum
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.stored import DenseSpec, SparseSpec, SumSpec, WeightSpec
from pocketlm.core.tensors import Dense, Sparse
from pocketlm.lowrank.factor import (
    Diagonal,
    best_factors,
    factor_flops,
    left_alone,
    stored,
    whitening,
)
from pocketlm.lowrank.rank import Ranked, plain_form


class Losparse(Ranked):
    """Two thin factors and a sparse rest.

    Attributes:
        ratio: Share of each linear's parameters that is removed; the mask's bits come on top.
        density: Share of each row's weights that the sparse part keeps.
        rounds: Turns of both parts.
        whitening: Whether the factors are the best for the inputs' Hessian, not its diagonal.
        damping: Share of the Hessian's mean diagonal that is added.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)

    density: float = Field(default=0.05, gt=0, lt=1)
    rounds: int = Field(default=8, ge=1, le=1000)
    whitening: bool = True
    damping: float = Field(1e-4, gt=0, le=1)

    @model_validator(mode="after")
    def _room_for_both(self) -> Self:
        if self.allocation != "uniform":
            raise ValueError("losparse has no allocation but the uniform one")
        if self.rank is None and self.density >= 1 - self.share_removed > 0:
            ratio = self.share_removed
            raise ValueError(f"a density of {self.density} leaves no room at ratio {ratio}")
        return self

    @property
    def factors_share(self) -> float:
        """Share of a linear's parameters that its factors may hold."""
        return 1 - self.share_removed - self.density

    def form(self, name: str, shape: tuple[int, int], before: WeightSpec, dtype: Any) -> WeightSpec:
        """In what form a linear is after this step, as `Ranked.form` says it."""
        rank = self.rank_of(name, shape)
        if rank is None:
            return before
        base = SparseSpec(values=DenseSpec(dtype=dtype), kept=self.kept(shape))
        return SumSpec(base=base, low=plain_form(rank, dtype))

    def kept(self, shape: tuple[int, int]) -> int:
        """Weights that the sparse part of a linear (O, I) keeps."""
        return shape[0] * max(1, round(self.density * shape[1]))

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as a sparse weight plus two factors."""
        rank = self.rank_of(state.name, state.shape)
        if rank is None:
            return left_alone(state)
        weight_OI, hessian, dtype = state.reference_OI, stats[Hessian], state.scale_dtype
        size_I = hessian.diagonal_I().sqrt()
        notes: tuple[Note, ...] = ()
        metric = Diagonal(size_I)
        if self.whitening:
            metric, notes = whitening(hessian, self.damping, 0.0)
        each = self.kept(state.shape) // state.shape[0]
        loud_OI = torch.zeros_like(weight_OI)
        mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
        low = None
        for _ in range(self.rounds):
            low = stored(*best_factors(weight_OI - loud_OI, rank, metric), dtype)
            rest_OI = weight_OI - low.dequantize()
            mask_OI = largest(rest_OI * size_I if hessian.reached else rest_OI, each)
            loud_OI = (rest_OI * mask_OI).to(dtype).float()
        assert low is not None
        return state.with_current(Sum(Sparse(Dense(loud_OI.to(dtype)), mask_OI), low), *notes)

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition and a sort in each round."""
        held = 4 * (7 * rows * columns + 4 * columns * columns)
        flops = self.rounds * factor_flops(rows, columns) + columns**3
        return Cost(held, flops, calls=40 * self.rounds)


def largest(score_OI: Tensor, each: int) -> Tensor:
    """A mask [O, I] of the largest magnitudes of every row, exactly `each` in a row."""
    chosen_OK = score_OI.abs().topk(each, dim=1).indices
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    return mask_OI.scatter_(1, chosen_OK, True)
