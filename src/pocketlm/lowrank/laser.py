"""LASER: a much lower rank for a few chosen matrices, everything else untouched.

The paper (arXiv:2312.13558) keeps the share ρ of the largest rank min(O, I), by plain SVD, of
single matrices: it gains most in the MLPs of late layers, at ρ as small as 0.01. Which layers help
depends on model and task and is searched there; here it is said.

Deviation: the paper stores the product; here the factors are stored, which also makes it smaller
where ρ is below O I / ((O + I) min(O, I)).

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Strict, matches
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Stat
from pocketlm.core.stored import WeightSpec
from pocketlm.lowrank.factor import Plain, factor_flops, factorised
from pocketlm.lowrank.rank import plain_form


class Laser(Strict):
    """Rank reduction of selected matrices.

    Attributes:
        layers: The decoder blocks, such as "24-29" or "20,28"; has to be said.
        keep: ρ, the share of the largest rank that stays.
        modules: Patterns of the linears that are reduced.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"factors"})

    layers: str | None = None
    keep: float = Field(0.1, gt=0, lt=1)
    modules: tuple[str, ...] = ("*.mlp.*", "*.feed_forward.*", "*.block_sparse_moe.*")

    @field_validator("layers", mode="before")
    @classmethod
    def _readable(cls, layers: object) -> str | None:
        if layers is None:
            return None
        text = str(layers).replace(" ", "")
        if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise ValueError(f"'{layers}' is no list of layers such as 24-29 or 20,28")
        return text

    @property
    def patterns(self) -> tuple[str, ...]:
        """None that must match: the defaults name families' MLPs."""
        return ()

    @property
    def idle(self) -> bool:
        """Whether the options ask for nothing; they always ask for something."""
        return False

    def rank_of(self, name: str, shape: tuple[int, int]) -> int | None:
        """The rank of a linear; None where it stays as it is.

        Args:
            name: Module path; the first number in it is that of its layer.
            shape: (O, I).

        Raises:
            ConfigError: If no layers are said.
        """
        place = re.search(r"\.(\d+)\.", name)
        if place is None or int(place[1]) not in self._numbers():
            return None
        if not any(matches(pattern, name) for pattern in self.modules):
            return None
        return max(1, int(self.keep * min(shape)))

    def form(self, name: str, shape: tuple[int, int], before: WeightSpec, dtype: str) -> WeightSpec:
        """In what form a linear is after this step, as `Ranked.form` says it."""
        rank = self.rank_of(name, shape)
        return before if rank is None else plain_form(rank, dtype)

    def _numbers(self) -> set[int]:
        if self.layers is None:
            raise ConfigError(
                "laser has to be told which layers it reduces.",
                where="recipe step 'laser'",
                remedy="In a recipe: `- {method: laser, layers: 24-29}`; late ones, as a rule.",
            )
        numbers: set[int] = set()
        for part in self.layers.split(","):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
        return numbers

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as two factors, where it is one of the chosen."""
        return factorised(state, self.rank_of(state.name, state.shape), Plain())

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition."""
        return Cost(16 * rows * columns, factor_flops(rows, columns), calls=20)
