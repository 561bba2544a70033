"""Recipes: steps in order, the grids that they aim at, and the patterns that name linears."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator, model_serializer

from pocketlm.core.spec.activations import ActivationSpec
from pocketlm.core.spec.numbers import QuantSpec
from pocketlm.core.spec.strict import Strict


class StepSpec(Strict):
    """One step of a recipe by name, its options unchecked until the catalog resolves it."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(Strict):
    """An ordered list of steps, the grid they aim at, and what they leave alone.

    Attributes:
        steps: What is done, in order.
        weights: The grid of every linear that no override names; None: values stay floats, as
            they do in a recipe that prunes only.
        overrides: Pattern → another grid; the last matching pattern rules. Embedding and head are
            compressed where an override spells their path, or its last part, and only there.
        ignore: Patterns of linears kept as they are.
        activations: How the inputs of every compressed linear are rounded; None: not at all.
        mix: llama.cpp's name of a mixture of types, such as ``Q4_K_M``: grids of linears, embedding
            and head by its rules, which become overrides once the model is known; None: no mixture.
    """

    steps: tuple[StepSpec, ...] = Field(min_length=1)
    weights: QuantSpec | None = Field(default_factory=lambda: QuantSpec.parse({}))
    overrides: dict[str, QuantSpec] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    activations: ActivationSpec | None = None
    mix: str | None = None

    @model_serializer(mode="wrap")
    def _without_mix(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out a mixture where there is none: files written before stay as they are."""
        return {key: value for key, value in plain(self).items() if key != "mix" or value}

    @field_validator("steps", mode="before")
    @classmethod
    def _flat_steps(cls, steps: Any) -> Any:
        """Accepts ``gptq`` and ``{method: gptq, damping: 0.02}`` beside the nested form."""
        if not isinstance(steps, list | tuple):
            return steps
        return [_nested_step(step) for step in steps]

    def ignores(self, name: str) -> bool:
        """Whether the recipe leaves the linear `name` alone."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def spec_for(self, name: str) -> QuantSpec | None:
        """The grid for the linear `name`, or None where it gets none."""
        if self.ignores(name):
            return None
        chosen = self.weights
        for pattern, spec in self.overrides.items():
            if matches(pattern, name):
                chosen = spec
        return chosen

    def spec_for_end(self, name: str) -> QuantSpec | None:
        """The grid for the embedding or head `name`; None where no override spells its name."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        spelled = (name, name.rpartition(".")[2])
        named = [spec for pattern, spec in self.overrides.items() if pattern in spelled]
        return named[-1] if named else None


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
