r"""From a choice to an ordinary recipe: the commonest grid for all, short patterns for the rest.

re:model\.layers\.(0|3|29)\.mlp\.(down_proj)$ : {bits: 5, …}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from pocketlm.core.spec import QuantSpec, Recipe


def with_grids(
    recipe: Recipe,
    grids: Mapping[str, QuantSpec],
    shapes: Mapping[str, tuple[int, int]],
    block_paths: Sequence[str],
) -> Recipe:
    """The recipe with a grid for each linear.

    Args:
        recipe: Its steps and what it ignores stay; its grids and overrides are replaced.
        grids: Module path → grid as asked for (not fitted), of every linear it does not ignore.
        shapes: (O, I) by module path: the grid of most weights becomes the recipe's own.
        block_paths: Of the model.

    Returns:
        A recipe that gives each of these linears its grid.
    """
    weights = Counter[QuantSpec]()
    for name, spec in grids.items():
        weights[spec] += shapes[name][0] * shapes[name][1]
    common = weights.most_common(1)[0][0]
    overrides: dict[str, QuantSpec] = {}
    for spec in weights:
        names = [name for name in grids if grids[name] == spec]
        if spec != common:
            overrides.update({pattern: spec for pattern in patterns(names, block_paths)})
    rewritten = recipe.model_copy(update={"weights": common, "overrides": overrides})
    # Patterns run over the numbers of experts; one that differs from the others gets its own line.
    strayed = {name: spec for name, spec in grids.items() if rewritten.spec_for(name) != spec}
    return rewritten.model_copy(update={"overrides": overrides | strayed})


def patterns(names: Sequence[str], block_paths: Sequence[str]) -> list[str]:
    r"""Patterns over linears: those of the same blocks share one.

    Args:
        names: Module paths; all experts of a layer, or none: their numbers become ``\d+``.
        block_paths: Of the model.
    """
    # what is before the block's number → path inside the block → numbers
    found: dict[str, dict[str, list[str]]] = {}
    exact: list[str] = []
    for name in names:
        path = next((p for p in block_paths if name.startswith(f"{p}.")), None)
        head, _, number = "" if path is None else path.rpartition(".")
        if path is None or not number.isdigit():
            exact.append(name)
            continue
        inner = re.sub(r"\.\d+\.", ".#.", name.removeprefix(f"{path}."))
        numbers = found.setdefault(head, {}).setdefault(inner, [])
        if number not in numbers:
            numbers.append(number)
    made = list(exact)
    for head, by_inner in found.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for inner, numbers in by_inner.items():
            alike.setdefault(tuple(numbers), []).append(inner)
        for numbers, inners in alike.items():
            paths = "|".join(re.escape(inner).replace(r"\#", r"\d+") for inner in inners)
            made.append(rf"re:{re.escape(head)}\.({'|'.join(numbers)})\.({paths})$")
    return made
