"""Whether factors can be what a recipe asks, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pocketlm.core.errors import ConfigError, UnsupportedLayer, nearest
from pocketlm.core.spec import QuantSpec, matches
from pocketlm.core.stored import DenseSpec, LowRankSpec, SumSpec
from pocketlm.formats.capabilities import capability, check_layer

if TYPE_CHECKING:
    from pocketlm.engine.grids import Grids


def check_factors(
    grids: Grids, shapes: Mapping[str, tuple[int, int]], target: str
) -> dict[str, str]:
    """Refuses factors that cannot be what the recipe asks, before a weight is read.

    Args:
        grids: The fitted grids.
        shapes: (O, I) of every linear, by module path.
        target: Engine that must load the result.

    Returns:
        Module path → what is to be told of its factors.

    Raises:
        ConfigError: If a pattern matches nothing, or a step factorises no linear.
        UnsupportedLayer: If the target does not load the format, or a grid does not fit a factor.
    """
    if grids.factoring and grids.format_name not in capability(target).formats:
        raise UnsupportedLayer(
            f"{target} does not load the format {grids.format_name}, the only one with factors.",
            remedy="Leave out --target, or export the artifact: `pocketlm export --to dense`.",
        )
    for step in grids.factoring:
        if "factors" in step.makes:
            _require_work(step, list(grids.specs))
    notes: dict[str, str] = {}
    factorised = 0
    for name in grids.specs if grids.factoring else ():
        rows, columns = shapes[name]
        form = grids.stored(name, (rows, columns), torch.bfloat16)
        if isinstance(form, LowRankSpec):
            _check_factor(form.left, (rows, form.rank), f"{name}.left", target)
            if form.rank * (rows + columns) >= rows * columns:
                notes[name] = f"factors of rank {form.rank} hold more than the weight they replace."
        if isinstance(form, LowRankSpec | SumSpec):
            factorised += 1
    steps: list[Any] = [step for step in grids.factoring if "factors" in step.makes]
    if steps and not factorised:
        raise ConfigError(
            f"{type(steps[-1]).__name__} factorises no linear of this model.",
            where="recipe",
            remedy="Look at its `modules`, `ranks` and `layers`.",
        )
    return notes


def _require_work(step: Any, names: Sequence[str]) -> None:
    for pattern in step.patterns:
        if not any(matches(pattern, name) for name in names):
            leaves = {name.rsplit(".", 1)[-1] for name in names}
            raise ConfigError(
                f"the pattern '{pattern}' matches no linear that is compressed.",
                where=f"recipe step {type(step).__name__}",
                remedy=nearest(pattern, {*leaves, *names} if "." in pattern else leaves),
            )


def _check_factor(
    spec: QuantSpec | DenseSpec, shape: tuple[int, int], where: str, target: str
) -> None:
    """A left factor is as narrow as the rank: not every grid fits it."""
    if isinstance(spec, DenseSpec):
        return
    if not spec.fits(shape[1]) or (spec.type != "int" and shape[1] * spec.bits % 8):
        raise UnsupportedLayer(
            f"the grid {spec.name} does not fit a factor of {shape[1]} columns.",
            where=where,
            remedy="Give the factorising step `multiple_of: 32`, or choose integers.",
        )
    check_layer("pocketlm", spec, shape, target, where)
