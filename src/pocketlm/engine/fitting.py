"""Number formats in the groups that a weight's columns allow, and what is told of a change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pocketlm.core.spec import SUPER_BLOCK, QuantSpec
from pocketlm.formats.gguf_hold import native
from pocketlm.formats.targets import EXPERT


def columns_to_fit(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Module path → what its groups have to divide: its columns, and for experts, which share one
    grid in a layer, those of all of them.

    Args:
        shapes: (O, I) of every linear, by module path.
    """
    found = {name: columns for name, (_, columns) in shapes.items()}
    layers = {name: match[1] for name in shapes if (match := EXPERT.match(name))}
    common: dict[str, int] = {}
    for name, layer in layers.items():
        common[layer] = math.gcd(common.get(layer, 0), found[name])
    return found | {name: common[layer] for name, layer in layers.items()}


def fitted_grid(asked: QuantSpec, columns: int, target: str) -> QuantSpec:
    """The grid that a linear gets: GGUF files have their own in the place of wider groups."""
    return (native(asked) if target == "llama.cpp" else asked).fit(columns)


def fitting_note(asked: QuantSpec, fitted: QuantSpec, columns: int) -> str:
    """Why a grid is another one than was asked for, as a sentence."""
    if fitted.name != asked.name:
        why = f"{SUPER_BLOCK} does not divide {columns} columns"
        if asked.scale != "k":
            why = "GGUF files have minima in the place of zero points"
        return f"{why}: {asked.name} becomes {fitted.name} in groups of {fitted.group_size}."
    if asked.fits(columns):
        return (
            f"GGUF files have a scale for each {fitted.group_size} columns: the group is "
            f"{fitted.group_size}, not {asked.group_size or 'the whole row'}."
        )
    return (
        f"groups of {asked.group_size} do not divide {columns} columns: "
        f"the group is {fitted.group_size or 'the whole row'}."
    )
