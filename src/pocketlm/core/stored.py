"""What is stored of one linear: how sparse a weight shall be, and in which form its values lie.

A recipe asks for a number format (`QuantSpec`) and a sparsity; a `WeightSpec` describes what was
written, exactly enough to find its tensors and count its bytes.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, model_serializer, model_validator

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Strict

MAX_GROUP = 64  # M of N:M, at most


class SparsitySpec(Strict):
    """How many weights are zero: a share of them, or all but N of every M neighbours of a row.

    Written as ``0.5`` or ``2:4``, in recipes and on the command line alike.

    Attributes:
        ratio: The share of zeros, from 0 to below 1; None where N:M is given.
        keep: N, the weights that stay; None where a ratio is given.
        of: M, neighbouring columns of a row.
    """

    ratio: float | None = Field(default=None, ge=0, lt=1)
    keep: int | None = Field(default=None, ge=1)
    of: int | None = Field(default=None, ge=2, le=MAX_GROUP)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str | int | float) and not isinstance(data, bool):
            text = str(data).strip()
            pair = re.fullmatch(r"(\d+):(\d+)", text)
            if pair:
                return {"keep": int(pair[1]), "of": int(pair[2])}
            try:
                return {"ratio": float(text)}
            except ValueError:
                raise ValueError(f"'{text}' is neither a share such as 0.5 nor N:M") from None
        return data

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.of is None) or (self.keep is None) != (self.of is None):
            raise ValueError("a sparsity is a share of zeros, or N and M")
        if self.keep is not None and self.of is not None and self.keep >= self.of:
            raise ValueError(f"{self.keep}:{self.of} leaves no zeros; N is below M")
        return self

    @model_serializer
    def _as_text(self) -> str:
        return self.name

    @classmethod
    def read(cls, text: str | float, where: str | None = None) -> SparsitySpec:
        """A sparsity from its text.

        Args:
            text: ``0.5``, ``2:4``.
            where: The place to name in an error.

        Raises:
            ConfigError: If it is none, or the share is not from 0 to below 1.
        """
        try:
            return cls.model_validate(text)
        except ValueError:
            raise ConfigError(
                f"'{text}' is no sparsity.",
                where=where,
                remedy="Give a share of zeros from 0 to below 1, such as 0.5, or N:M such as 2:4.",
            ) from None

    @property
    def name(self) -> str:
        """``0.5`` or ``2:4``."""
        return f"{self.keep}:{self.of}" if self.ratio is None else f"{self.ratio:g}"

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M); None where any weights may be zero."""
        return None if self.keep is None or self.of is None else (self.keep, self.of)

    @property
    def zeros(self) -> float:
        """The share of zeros."""
        if self.keep is not None and self.of is not None:
            return 1 - self.keep / self.of
        assert self.ratio is not None
        return self.ratio

    def pruned(self, weights: int) -> int:
        """How many of so many weights that compete with each other become zero: never all."""
        return min(math.floor(self.zeros * weights + 0.5), weights - 1)

    def check(self, columns: int, where: str | None = None) -> None:
        """Refuses groups that do not divide a row.

        Raises:
            UnsupportedLayer: With what to choose instead.
        """
        if self.of is not None and columns % self.of:
            raise UnsupportedLayer(
                f"groups of {self.of} ({self.name}) do not divide {columns} columns.",
                where=where,
                remedy="Choose an M that divides them, a share such as 0.5, or ignore the layer.",
            )


class DenseSpec(Strict):
    """Values as they are, a float each.

    Attributes:
        dtype: In which they are stored.
        transposed: Whether they lie as [I, O], as GPT-2's do.
    """

    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    transposed: bool = False

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}[self.dtype]

    @property
    def name(self) -> str:
        """``BF16``, ``FP16``, ``FP32`` or ``FP64``."""
        return f"{'BF' if self.dtype == 'bfloat16' else 'FP'}{self.bits}"

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = 16) -> int:
        """Bits of a weight [O, I]."""
        return shape[0] * shape[1] * self.bits


class SparseSpec(Strict):
    """The values that a mask keeps, and the mask.

    Attributes:
        values: In what form the kept values lie.
        kept: How many there are.
        pattern: (N, M) where each M neighbours keep N; None: any, and the mask is a bitmap.
    """

    values: QuantSpec | DenseSpec
    kept: int = Field(ge=0)
    pattern: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        """Bits of a kept value."""
        return self.values.bits

    @property
    def name(self) -> str:
        """Such as ``INT4, 2:4`` or ``BF16, bitmap``."""
        form = "bitmap" if self.pattern is None else f"{self.pattern[0]}:{self.pattern[1]}"
        return f"{self.values.name}, {form}"

    @property
    def index_bits(self) -> int | None:
        """Bits of a group's choice of N in M, ⌈log₂ C(M, N)⌉; None where a bitmap serves better."""
        if self.pattern is None or self.pattern[1] > 8:
            return None
        bits = math.ceil(math.log2(math.comb(self.pattern[1], self.pattern[0])))
        return bits if 2 <= bits < self.pattern[1] else None

    def mask_bits(self, shape: tuple[int, int]) -> int:
        """Bits of the mask of a weight (O, I), without the padding to whole words."""
        weights = shape[0] * shape[1]
        if self.index_bits is None or self.pattern is None:
            return weights
        return weights // self.pattern[1] * self.index_bits

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = 16) -> int:
        """Bits of a weight [O, I]: kept values, scales, mask."""
        absent = shape[0] * shape[1] - self.kept
        whole = self.values.stored_bits(shape, scale_bits)
        return whole - absent * self.values.bits + self.mask_bits(shape)


class LowRankSpec(Strict):
    """Two thin factors in the place of a weight, L [O, R] and R [R, I].

    Attributes:
        rank: R.
        left: In what form L lies.
        right: In what form R lies.
    """

    rank: int = Field(ge=1)
    left: QuantSpec | DenseSpec
    right: QuantSpec | DenseSpec

    @property
    def bits(self) -> int:
        """Bits of a factor's value, the wider one's."""
        return max(self.left.bits, self.right.bits)

    @property
    def name(self) -> str:
        """Such as ``rank 96 BF16`` or ``rank 96 INT8``."""
        same = self.left.name == self.right.name
        values = self.left.name if same else f"{self.left.name}, {self.right.name}"
        return f"rank {self.rank} {values}"

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = 16) -> int:
        """Bits of both factors of a weight [O, I]."""
        left = self.left.stored_bits((shape[0], self.rank), scale_bits)
        return left + self.right.stored_bits((self.rank, shape[1]), scale_bits)


class SumSpec(Strict):
    """A weight and two thin factors beside it, B + L R.

    Attributes:
        base: In what form B is.
        low: The factors.
    """

    base: QuantSpec | DenseSpec | SparseSpec
    low: LowRankSpec

    @property
    def bits(self) -> int:
        """Bits of a value of the base."""
        return self.base.bits

    @property
    def name(self) -> str:
        """Such as ``INT3 + rank 32 INT8``."""
        return f"{self.base.name} + {self.low.name}"

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = 16) -> int:
        """Bits of the base and both factors of a weight [O, I]."""
        return self.base.stored_bits(shape, scale_bits) + self.low.stored_bits(shape, scale_bits)


WeightSpec = QuantSpec | DenseSpec | SparseSpec | LowRankSpec | SumSpec


def values_of(form: WeightSpec) -> QuantSpec | DenseSpec:
    """In what form most values of a weight lie: of what it keeps, of its base, of its factors."""
    if isinstance(form, LowRankSpec):
        return form.right
    if isinstance(form, SumSpec):
        return values_of(form.base)
    return form.values if isinstance(form, SparseSpec) else form


_ANY: TypeAdapter[WeightSpec] = TypeAdapter(WeightSpec)


def parse_weight_spec(data: Any, where: str | None = None) -> WeightSpec:
    """What is stored of a weight, from plain data.

    Args:
        data: As ``model_dump`` gave it.
        where: The place to name in an error.

    Raises:
        ConfigError: If it is no such description.
    """
    if isinstance(data, dict) and not {"values", "dtype", "rank", "low"} & set(data):
        return QuantSpec.parse(data, where)  # with the error messages of a grid
    try:
        return _ANY.validate_python(data)
    except ValueError as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"no description of a weight: {what}", where=where) from None
