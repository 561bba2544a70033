"""Which linear gets which grid, in which format: decided once, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import ActivationSpec, QuantSpec, Recipe, matches
from pocketlm.formats.capabilities import capability, check_layer, check_model, is_expert
from pocketlm.formats.compressed_config import holds, mixed_in_bfloat16
from pocketlm.formats.packing import fills_bytes

MIN_COLUMNS = 32  # a narrower weight fills no word of the packed formats


@dataclass(frozen=True)
class Grids:
    """The fitted grid of every compressed linear, and what was left out and why.

    Attributes:
        specs: Module path → grid that divides its columns.
        kept: Module path → why it keeps its precision.
        notes: Module path → what was changed about its groups.
        format_name: The format that can hold all of it.
        inputs: Module path → how its inputs are rounded, of the linears whose are.
    """

    specs: Mapping[str, QuantSpec]
    kept: Mapping[str, str]
    notes: Mapping[str, str]
    format_name: str
    inputs: Mapping[str, ActivationSpec] = field(default_factory=dict)


def choose_grids(
    shapes: Mapping[str, tuple[int, int]], transposed: bool, recipe: Recipe, target: str
) -> Grids:
    """Fits the recipe's grids to the linears and checks them against the target's rules.

    Args:
        shapes: (O, I) of every linear, by module path.
        transposed: Whether a checkpoint stores linears as [I, O] (GPT-2).
        recipe: Grids, overrides and what to ignore.
        target: Engine that must load the result.

    Returns:
        The grids; group sizes that do not divide are replaced and noted.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left to compress.
        UnsupportedLayer: If the target cannot load a layer's grid, or the format.
    """
    _require_matches(recipe, shapes)
    capability(target)
    format_name = "pocketlm" if transposed or not _all_held(recipe) else "compressed-tensors"
    specs: dict[str, QuantSpec] = {}
    kept: dict[str, str] = {}
    notes: dict[str, str] = {}
    inputs: dict[str, ActivationSpec] = {}
    for name, shape in shapes.items():
        asked = recipe.spec_for(name)
        if asked is None:
            kept[name] = "the recipe ignores it"
        elif shape[1] < MIN_COLUMNS:
            kept[name] = f"only {shape[1]} columns; the format needs {MIN_COLUMNS}"
        elif asked.fixed_groups and not asked.fits(shape[1]):
            kept[name] = (
                f"groups of {asked.group_size}, as {asked.name} has them, do not divide "
                f"{shape[1]} columns"
            )
        elif asked.type != "int" and not fills_bytes(shape[1], asked.bits):
            kept[name] = f"{shape[1]} codes of {asked.bits} bits do not fill whole bytes"
        else:
            fitted = asked.fit(shape[1])
            if fitted != asked:
                becomes = fitted.group_size or "the whole row"
                notes[name] = (
                    f"groups of {asked.group_size} do not divide {shape[1]} columns: "
                    f"the group is {becomes}."
                )
            if recipe.activations is not None:
                if is_expert(name) and capability(target).expert_inputs is None:
                    text = f"{target} does not round inputs of experts: they stay as they come."
                    notes[name] = f"{notes[name]} {text}" if name in notes else text
                else:
                    inputs[name] = recipe.activations
            check_layer(format_name, fitted, shape, target, name, inputs.get(name))
            specs[name] = fitted
    if not specs:
        raise ConfigError(
            "nothing is left to compress.", where="--ignore", remedy="Ignore fewer layers."
        )
    check_model(specs, kept, target, inputs)
    for name in mixed_in_bfloat16(specs) if target == "transformers" else ():
        said = f"transformers decodes {specs[name].name} to bfloat16: load it in that dtype."
        notes[name] = f"{notes[name]} {said}" if name in notes else said
    return Grids(specs, kept, notes, format_name, inputs)


def _all_held(recipe: Recipe) -> bool:
    """Whether compressed-tensors has a storage for every number format of a recipe."""
    return all(holds(spec) for spec in (recipe.weights, *recipe.overrides.values()))


def _require_matches(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> None:
    for pattern in (*recipe.ignore, *recipe.overrides):
        if pattern == "lm_head" or any(matches(pattern, name) for name in shapes):
            continue
        leaves = {name.rsplit(".", 1)[-1] for name in shapes}
        raise ConfigError(
            f"the pattern '{pattern}' matches no linear.",
            where="recipe",
            remedy=nearest(pattern, {*leaves, *shapes} if "." in pattern else leaves),
        )


def linear_bits(
    spec: QuantSpec, shape: tuple[int, int], inputs: ActivationSpec | None = None
) -> int:
    """Stored bits of a linear: codes, scales, zero points, and what rounds its inputs.

    Args:
        spec: Its grid.
        shape: (O, I).
        inputs: How its inputs are rounded; None: not at all.
    """
    return spec.stored_bits(shape) + (0 if inputs is None else inputs.stored_bits)


def grid_text(spec: QuantSpec) -> str:
    """A number format: ``4 bits, symmetric, groups of 64``, ``NVFP4, groups of 16``."""
    if spec.group_rows is None:
        tiles = "one scale for the tensor"
    elif spec.group_rows > 1:
        tiles = f"blocks of {spec.group_rows} × {spec.group_size}"
    else:
        tiles = "one scale a row" if spec.group_size is None else f"groups of {spec.group_size}"
    if spec.type == "int":
        kind = "symmetric" if spec.symmetric else "asymmetric"
        return f"{spec.bits} bits, {kind}, {tiles}"
    twice = ", scales in 8 bits" if spec.scale == "dynamic8" else ""
    return f"{spec.name.partition('_')[0]}, {tiles}{twice}"


def inputs_text(spec: ActivationSpec) -> str:
    """A rounding of inputs in words, such as ``inputs in 8 bits, one scale a token``."""
    kind = "FP8" if spec.type == "float" else f"{spec.bits} bits"
    shared = {
        "token": "one scale a token",
        "group": f"one scale for {spec.group_size} columns of a token",
        "tensor": "one scale from calibration",
    }[spec.granularity]
    return f"inputs in {kind}, {'' if spec.symmetric else 'asymmetric, '}{shared}"


def scale_dtype_for(weight_dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of a linear's scales: bfloat16 beside bfloat16 weights, else float16."""
    return torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float16
