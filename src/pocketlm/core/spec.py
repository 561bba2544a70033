"""What to make: number formats and recipes, as frozen, validated values with a JSON round trip.

The *how* (scales, codes) is a method's business and the *where* (bits on disk) a format's.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pocketlm.core.errors import ConfigError, nearest

GROUP_SIZES = (128, 64, 32)  # what kernels of every target take, best first


class Strict(BaseModel):
    """A frozen value; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str | None = None) -> Self:
        """Builds the value from plain data.

        Args:
            data: Keys and values, as JSON or YAML give them.
            where: The place to name in an error.

        Returns:
            The validated value.

        Raises:
            ConfigError: On an unknown key or a value out of range.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or cls.__name__
            if first["type"] == "extra_forbidden":
                remedy = nearest(str(first["loc"][-1]), cls.model_fields)
                raise ConfigError(f"unknown option '{key}'.", where=where, remedy=remedy) from None
            raise ConfigError(f"option '{key}': {first['msg']}.", where=where) from None


class QuantSpec(Strict):
    """An integer grid: w ≈ scale * (code - zero), one scale for each group of a row's columns.

    Attributes:
        bits: Bits of a code, 2 to 8.
        symmetric: True: zero is 0 and codes run from -2^(bits-1) to 2^(bits-1)-1.
        group_size: Columns that share a scale; None: the whole row.
    """

    bits: int = Field(4, ge=2, le=8)
    symmetric: bool = True
    group_size: int | None = Field(128, ge=8)

    @property
    def code_min(self) -> int:
        """The smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code, 2^(bits-1)-1."""
        return (1 << (self.bits - 1)) - 1

    def bits_per_weight(self, columns: int, scale_bits: int = 16) -> float:
        """Real bits of one weight, scales and zero points counted."""
        group = self.group_size or columns
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) / group

    def fit(self, columns: int) -> QuantSpec:
        """The same grid with a group size that divides `columns`.

        The group size stays when it divides; else it becomes the largest smaller one of
        128, 64, 32 that does; else the whole row shares a scale. The caller announces it.
        """
        if self.group_size is None or columns % self.group_size == 0:
            return self
        smaller = [g for g in GROUP_SIZES if g < self.group_size and columns % g == 0]
        return self.model_copy(update={"group_size": smaller[0] if smaller else None})


_SCHEME = re.compile(r"W([2-8])A16", re.IGNORECASE)


def parse_scheme(name: str) -> QuantSpec:
    """The grid that a scheme name such as ``W4A16`` stands for (symmetric, group 128).

    Raises:
        ConfigError: If the name is no known scheme.
    """
    match = _SCHEME.fullmatch(name)
    if match is None:
        known = [f"W{bits}A16" for bits in range(2, 9)]
        raise ConfigError(
            f"unknown scheme '{name}'.", where="--scheme", remedy=nearest(name, known)
        )
    return QuantSpec(bits=int(match[1]), symmetric=True, group_size=128)


class StepSpec(Strict):
    """One step of a recipe by name, its options unchecked until the catalog resolves it."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(Strict):
    """An ordered list of steps, the grid they aim at, and what they leave alone.

    Attributes:
        steps: What is done, in order.
        weights: The grid of every linear that no override names.
        overrides: Pattern → another grid; the last matching pattern rules.
        ignore: Patterns of linears kept as they are.
    """

    steps: tuple[StepSpec, ...] = Field(min_length=1)
    weights: QuantSpec = Field(default_factory=lambda: QuantSpec.parse({}))
    overrides: dict[str, QuantSpec] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    @field_validator("steps", mode="before")
    @classmethod
    def _flat_steps(cls, steps: Any) -> Any:
        """Accepts ``gptq`` and ``{method: gptq, damping: 0.02}`` beside the nested form."""
        if not isinstance(steps, list | tuple):
            return steps
        return [_nested_step(step) for step in steps]

    def spec_for(self, name: str) -> QuantSpec | None:
        """The grid for the linear `name`, or None where the recipe leaves it alone."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        chosen = self.weights
        for pattern, spec in self.overrides.items():
            if matches(pattern, name):
                chosen = spec
        return chosen


def _nested_step(step: Any) -> Any:
    if isinstance(step, str):
        return {"method": step}
    if isinstance(step, dict) and "method" in step and "options" not in step:
        return {
            "method": step["method"],
            "options": {k: v for k, v in step.items() if k != "method"},
        }
    return step


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a linear.

    Args:
        pattern: An exact module path, ``Linear`` (all), ``re:…`` (from the start) or a glob.
        name: The module path, such as ``model.layers.0.mlp.up_proj``.

    Returns:
        True where it does. A pattern without dots also names the last part of the path.
    """
    if pattern == "Linear":
        return True
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if name == pattern or fnmatch.fnmatchcase(name, pattern):
        return True
    return "." not in pattern and fnmatch.fnmatchcase(name.rsplit(".", 1)[-1], pattern)
