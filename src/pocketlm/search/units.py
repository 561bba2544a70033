"""What is chosen: units of linears that get one grid, and the grids that each may get.

A unit is what the target engine runs as one layer (q, k, v; gate, up; the experts of a layer), else
a single linear. A candidate's price counts codes, scales, zero points and, in bytes, the padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec, Recipe, matches
from pocketlm.core.views import End, ModelView
from pocketlm.engine.fitting import columns_to_fit
from pocketlm.engine.grids import Grids, linear_bits, scale_dtype_for
from pocketlm.formats import format_for
from pocketlm.formats.capabilities import capability, check_layer, unit_of

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Candidate:
    """One grid that a unit may get.

    Attributes:
        spec: The grid as a recipe asks for it; None: it keeps its precision.
        specs: Module path → the grid, fitted to the columns.
        bits: Stored bits of the unit, as `linear_bits` counts them; 0 of an embedding or head,
            which no average of bits counts.
        file_bytes: Bytes of its tensors in the files.
    """

    spec: QuantSpec | None
    specs: Mapping[str, QuantSpec]
    bits: int
    file_bytes: int


@dataclass(frozen=True)
class Unit:
    """Linears that get one grid.

    Attributes:
        name: As `unit_of` gives it.
        block: Index of the block.
        linears: Module paths.
        weights: How many weights they have.
        candidates: Grids it may get, by rising bytes.
        end: The embedding or head that it is; None for linears.
    """

    name: str
    block: int
    linears: tuple[str, ...]
    weights: int
    candidates: tuple[Candidate, ...]
    end: End | None = None


def default_candidates(recipe: Recipe) -> tuple[QuantSpec, ...]:
    """The recipe's grid at 2, 3, 4, 5, 6 and 8 bits; of NF, integers above 4 bits.

    Raises:
        ConfigError: If its number format has one width.
    """
    if recipe.weights is not None and recipe.weights.type == "nf":
        integers = {"type": "int", "scale": "float"}
        return tuple(
            recipe.weights.model_copy(update={"bits": bits, **(integers if bits > 4 else {})})
            for bits in BITS
        )
    if recipe.weights is None or recipe.weights.type != "int":
        raise ConfigError(
            f"{'a float' if recipe.weights is None else recipe.weights.name} has one width; "
            "a budget needs grids to choose from.",
            where="recipe",
            remedy="Start from integers such as w4a16, or name `candidates` in Python.",
        )
    return tuple(recipe.weights.model_copy(update={"bits": bits}) for bits in BITS)


def choice_units(
    model: ModelView,
    recipe: Recipe,
    grids: Grids,
    candidates: Sequence[QuantSpec],
    target: str,
) -> list[Unit]:
    """The units that are free to choose, in the order of the model.

    Args:
        model: The source.
        recipe: Its overrides are kept: what they name is not chosen.
        grids: The recipe's grids as they would be without a search.
        candidates: Grids that may be chosen.
        target: Engine that must load the result.

    Returns:
        Units with at least one candidate each.

    Raises:
        UnsupportedLayer: If no candidate suits a unit, or the target takes one grid only.
        ConfigError: If the overrides leave nothing to choose.
    """
    _refuse_one_grid(candidates, target)
    shapes = model.linear_shapes()
    members: dict[str, list[str]] = {}
    for name in grids.quantized:
        members.setdefault(unit_of(name, target), []).append(name)
    units: list[Unit] = []
    for unit, linears in members.items():
        if any(matches(pattern, name) for pattern in recipe.overrides for name in linears):
            continue
        block = _block_of(linears[0], model.block_paths)
        found = _candidates(model, shapes, linears, candidates, grids, target)
        units.append(
            Unit(
                name=unit,
                block=block,
                linears=tuple(linears),
                weights=sum(math.prod(shapes[name]) for name in linears),
                candidates=found,
            )
        )
    if not units:
        raise ConfigError(
            "the recipe's overrides name every linear; nothing is left to choose.",
            where="recipe",
            remedy="Leave some linears without an override.",
        )
    return units


def _refuse_one_grid(candidates: Sequence[QuantSpec], target: str) -> None:
    asymmetric = any(not spec.symmetric for spec in candidates)
    if asymmetric and len(candidates) > 1 and capability(target).asymmetric_needs_one_grid:
        raise UnsupportedLayer(
            f"{target} decodes a model with zero points by one grid; there is nothing to choose.",
            where="--asym",
            remedy="Search over symmetric grids, or choose another target.",
        )


def _block_of(name: str, paths: Sequence[str]) -> int:
    return next(i for i, path in enumerate(paths) if name.startswith(f"{path}."))


def _candidates(
    model: ModelView,
    shapes: Mapping[str, tuple[int, int]],
    linears: Sequence[str],
    candidates: Sequence[QuantSpec],
    grids: Grids,
    target: str,
) -> tuple[Candidate, ...]:
    """What suits every linear of a unit; of grids that come out alike the first."""
    found: dict[tuple[QuantSpec, ...], Candidate] = {}
    refusal: UnsupportedLayer | None = None
    columns = columns_to_fit(shapes, target)
    for spec in candidates:
        specs = {name: spec.fit(columns[name]) for name in linears}
        try:
            for name, fitted in specs.items():
                check_layer(
                    grids.format_name, fitted, shapes[name], target, name, grids.inputs.get(name)
                )
        except UnsupportedLayer as error:
            refusal = error
            continue
        found.setdefault(
            tuple(specs.values()),
            Candidate(
                spec,
                specs,
                bits=sum(
                    linear_bits(specs[name], shapes[name], grids.inputs.get(name))
                    for name in linears
                ),
                file_bytes=file_bytes(model, specs, grids.format_name, grids.inputs),
            ),
        )
    if not found:
        assert refusal is not None
        raise refusal
    return tuple(sorted(found.values(), key=lambda candidate: candidate.file_bytes))


def file_bytes(
    model: ModelView,
    specs: Mapping[str, QuantSpec],
    format_name: str,
    inputs: Mapping[str, ActivationSpec],
) -> int:
    """Bytes that linears take in the files, packing padded.

    Args:
        model: The source.
        specs: Module path → fitted grid.
        format_name: The format they are written in.
        inputs: Module path → how its inputs are rounded, of the linears whose are.
    """
    infos, shapes, section = model.source.infos(), model.linear_shapes(), format_for(format_name)
    dtypes = {name: scale_dtype_for(infos[f"{name}.weight"].dtype) for name in specs}
    return sum(
        section.stored_bytes(spec, shapes[name], dtypes[name], inputs.get(name))
        for name, spec in specs.items()
    )
