"""What methods that add a low-rank part to a quantized weight have in common: W ≈ Q + L R.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.core.factored import LowRank, Sum
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState
from pocketlm.core.stored import DenseSpec, LowRankSpec, SumSpec, WeightSpec
from pocketlm.core.tensors import Dense, Packed, Sparse
from pocketlm.lowrank.rank import Chosen
from pocketlm.quant.grid import minmax_grid, round_to_grid

RANK = 32  # of LQER's main results


class Repair(Chosen):
    """The options of methods that repair a quantized weight.

    Attributes:
        rank: Of the low-rank part.
        bits: Of the factors' codes, symmetric integers; None: 16-bit floats.
        group_size: Columns of a factor that share a scale, where they divide; else whole rows.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "grid", "shape", "factors"})
    makes: ClassVar[frozenset[str]] = frozenset({"factors"})

    rank: int | None = Field(default=RANK, ge=1)
    bits: int | None = Field(default=8, ge=2, le=8)
    group_size: int = Field(default=128, ge=8)

    def factor_spec(self, columns: int) -> QuantSpec | None:
        """The number format of a factor with so many columns; None: 16-bit floats."""
        if self.bits is None:
            return None
        return QuantSpec(bits=self.bits, group_size=self.group_size).fit(columns)

    def form(self, name: str, shape: tuple[int, int], before: WeightSpec, dtype: Any) -> WeightSpec:
        """In what form a linear is after this step.

        Args:
            name: Module path.
            shape: (O, I).
            before: Its form before.
            dtype: Of 16-bit values.
        """
        rank = self.rank_of(name, shape)
        if rank is None:
            return before
        floats = DenseSpec(dtype=dtype)
        left, right = (self.factor_spec(columns) or floats for columns in (rank, shape[1]))
        base = before.base if isinstance(before, SumSpec) else before
        if isinstance(base, DenseSpec | LowRankSpec):
            raise _nothing_to_repair(type(self).__name__.lower(), name)
        return SumSpec(base=base, low=LowRankSpec(rank=rank, left=left, right=right))

    def encoded(self, factor: Tensor, dtype: torch.dtype) -> Dense | Packed:
        """A factor as it is stored, rounded to the nearest.

        Args:
            factor: [O, R] or [R, I], float32.
            dtype: Of 16-bit values and scales.
        """
        spec = self.factor_spec(factor.shape[1])
        if spec is None:
            return Dense(factor.to(dtype))
        return round_to_grid(factor, minmax_grid(factor, spec, dtype), spec)


def base_of(state: LinearState, step: str) -> Dense | Packed | Sparse:
    """What is to be repaired: the weight of the steps before, without an earlier low-rank part.

    Args:
        state: The linear.
        step: The method's name for the message.

    Raises:
        ConfigError: If no step before left anything that could be repaired.
    """
    current = state.current
    base = current.base if isinstance(current, Sum) else current
    if base is None or isinstance(base, LowRank) or isinstance(base.spec, DenseSpec):
        raise _nothing_to_repair(step, state.name)
    assert isinstance(base, Dense | Packed | Sparse)
    return base


def _nothing_to_repair(step: str, name: str) -> ConfigError:
    return ConfigError(
        f"{step} repairs a quantized weight, and no step before it left one.",
        where=name,
        remedy="Put a step such as gptq or rtn before it.",
    )
