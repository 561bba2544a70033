"""Number formats in the groups that a weight's columns allow, and what is told of a change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import GROUP_SIZES, SUPER_BLOCK, QuantSpec, Recipe
from pocketlm.formats.gguf_hold import native
from pocketlm.formats.targets import is_expert, unit_of

DEFAULT_GROUP_SIZE = QuantSpec.model_fields["group_size"].default


def columns_to_fit(shapes: Mapping[str, tuple[int, int]], target: str) -> dict[str, int]:
    """Module path → what its groups have to divide: its columns, and for experts, which share one
    grid, those of all that do.

    Args:
        shapes: (O, I) of every linear, by module path.
        target: Engine that must load the result.
    """
    found = {name: columns for name, (_, columns) in shapes.items()}
    layers = {name: unit_of(name, target) for name in shapes if is_expert(name)}
    common: dict[str, int] = {}
    for name, layer in layers.items():
        common[layer] = math.gcd(common.get(layer, 0), found[name])
    return found | {name: common[layer] for name, layer in layers.items()}


def fitted_grid(asked: QuantSpec, columns: int, target: str) -> QuantSpec:
    """The grid that a linear gets: GGUF files have their own in the place of wider groups."""
    return (native(asked) if target == "llama.cpp" else asked).fit(columns)


def require_a_fit(recipe: Recipe, columns: Mapping[str, int]) -> None:
    """Refuses a group size that no linear can have: then nothing would be as it was asked for.

    The default of 128 passes: it says to take the largest that divides.

    Args:
        recipe: What is asked for.
        columns: Module path → what its groups have to divide.

    Raises:
        ConfigError: With the sizes that would do.
    """
    asked: dict[int | None, tuple[QuantSpec, set[int]]] = {}
    for name, width in columns.items():
        spec = None if recipe.ignores(name) else recipe.spec_for(name)
        if spec is not None and not spec.fixed_groups:
            asked.setdefault(spec.group_size, (spec, set()))[1].add(width)
    for size, (spec, widths) in asked.items():
        if size == DEFAULT_GROUP_SIZE or any(map(spec.fits, widths)):
            continue
        would = [str(g) for g in GROUP_SIZES if any(width % g == 0 for width in widths)]
        raise ConfigError(
            f"groups of {size} divide the columns of no linear "
            f"({', '.join(map(str, sorted(widths)))}).",
            where="--group-size",
            remedy=f"Give {', '.join([*would, 'or -1 for the whole row'])}.",
        )


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
