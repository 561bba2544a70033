"""How many directions of a linear are kept: by the share of parameters to remove, or by number.

Two factors of rank R hold R (O + I) parameters where the weight held O I, so that a share `ratio`
is removed by  R = ⌊(1 - ratio) O I / (O + I)⌋.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Strict, matches
from pocketlm.core.stored import DenseSpec, LowRankSpec, WeightSpec

RATIO = 0.2  # where nothing is said


class Chosen(Strict):
    """Which linears a step treats, and with which rank.

    Attributes:
        rank: The rank of every linear.
        ranks: Pattern → rank, of linears that differ; 0 leaves them as they are. The last matching
            pattern rules.
        modules: Patterns of the linears that are treated; others stay as they are.
    """

    rank: int | None = Field(default=None, ge=1)
    ranks: dict[str, int] = Field(default_factory=dict)
    modules: tuple[str, ...] = ("Linear",)

    @field_validator("ranks")
    @classmethod
    def _not_negative(cls, ranks: dict[str, int]) -> dict[str, int]:
        negative = [pattern for pattern, rank in ranks.items() if rank < 0]
        if negative:
            raise ValueError(f"the rank of '{negative[0]}' is negative")
        return ranks

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of linears that it names: each must match some."""
        return (*self.modules, *self.ranks)

    @property
    def idle(self) -> bool:
        """Whether the options ask for nothing."""
        return False

    def rank_of(self, name: str, shape: tuple[int, int]) -> int | None:
        """The rank of a linear, at most its shorter side; None where it stays as it is.

        Args:
            name: Module path.
            shape: (O, I).

        Raises:
            ConfigError: If the linear is too small for the ratio that is asked for.
        """
        if not any(matches(pattern, name) for pattern in self.modules):
            return None
        named = [rank for pattern, rank in self.ranks.items() if matches(pattern, name)]
        rank = named[-1] if named else self._common_rank(name, shape)
        return min(rank, *shape) if rank else None

    def _common_rank(self, name: str, shape: tuple[int, int]) -> int | None:
        return self.rank


class Ranked(Chosen):
    """The options of methods that put factors in the place of the weight.

    Attributes:
        ratio: Share of each linear's parameters that is removed; 0 leaves every linear as it is.
            In place of `rank`; 0.2 where none of ratio, rank and ranks is given.
        multiple_of: Ranks that follow from a ratio are rounded down to a multiple of this where
            they reach it: 8 is what tensor cores want, with 32 or more the groups of a quantized
            left factor divide its columns.
        allocation: How the ratio is shared out. "uniform": the same for every linear; "energy": by
            what each direction carries of the linear's output; "sensitivity": that times what an
            error of the linear costs the model. The latter two are measured before the run
            (`search.ranks`) and become `ranks`.
    """

    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"factors"})

    ratio: float | None = Field(default=None, ge=0, lt=1)
    multiple_of: int = Field(default=8, ge=1)
    allocation: Literal["uniform", "energy", "sensitivity"] = "uniform"

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.ratio is not None and self.rank is not None:
            raise ValueError("ratio and rank contradict each other: give one of them")
        if self.rank is not None and self.allocation != "uniform":
            raise ValueError(f"allocation '{self.allocation}' shares out a ratio, not a rank")
        return self

    @property
    def idle(self) -> bool:
        """Whether the options ask for nothing: a ratio of 0."""
        return self.rank is None and not self.share_removed and not any(self.ranks.values())

    @property
    def share_removed(self) -> float:
        """The ratio, said or not."""
        if self.ratio is None:
            return 0.0 if self.ranks else RATIO
        return self.ratio

    @property
    def factors_share(self) -> float:
        """Share of a linear's parameters that its factors may hold."""
        return 1 - self.share_removed

    def _common_rank(self, name: str, shape: tuple[int, int]) -> int | None:
        if self.rank is not None:
            return self.rank
        if not self.share_removed:
            return None
        return rank_at(self.factors_share, shape, self.multiple_of, name)

    def form(self, name: str, shape: tuple[int, int], before: WeightSpec, dtype: str) -> WeightSpec:
        """In what form a linear is after this step.

        Args:
            name: Module path.
            shape: (O, I).
            before: Its form before.
            dtype: Of 16-bit values.
        """
        rank = self.rank_of(name, shape)
        return before if rank is None else plain_form(rank, dtype)


def plain_form(rank: int, dtype: Any) -> LowRankSpec:
    """Two factors of floats."""
    return LowRankSpec(rank=rank, left=DenseSpec(dtype=dtype), right=DenseSpec(dtype=dtype))


def rank_at(share: float, shape: tuple[int, int], multiple_of: int = 1, where: str = "") -> int:
    """The largest rank whose factors hold at most a share of the parameters.

    Args:
        share: Of the parameters O I, from 0 to 1.
        shape: (O, I).
        multiple_of: What the rank is rounded down to, if it reaches it.
        where: Module path for the message.

    Raises:
        ConfigError: If not even rank 1 fits.
    """
    rows, columns = shape
    rank = int(share * rows * columns / (rows + columns))
    if rank < 1:
        raise ConfigError(
            f"factors of a {rows} x {columns} linear do not fit into {share:.0%} of its "
            "parameters, even of rank 1.",
            where=where or None,
            remedy="Lower the ratio, or leave the layer out with --ignore.",
        )
    return rank - rank % multiple_of if rank >= multiple_of else rank
