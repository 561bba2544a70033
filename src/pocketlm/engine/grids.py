"""Which linear gets which grid, in which format: decided once, before a weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pocketlm.core.errors import ConfigError, UnsupportedLayer, nearest
from pocketlm.core.spec import ActivationSpec, QuantSpec, Recipe, matches
from pocketlm.core.state import PruningStep, Step
from pocketlm.core.stored import (
    DenseSpec,
    LowRankSpec,
    SparseSpec,
    SparsitySpec,
    SumSpec,
    WeightSpec,
)
from pocketlm.core.views import End
from pocketlm.engine.end_grids import check_end_grid, choose_ends
from pocketlm.engine.factor_checks import check_factors
from pocketlm.engine.factors import predicted_form
from pocketlm.engine.fitting import columns_to_fit, fitted_grid, fitting_note, require_a_fit
from pocketlm.formats.capabilities import (
    capability,
    check_layer,
    check_model,
    check_shortcuts,
    is_expert,
)
from pocketlm.formats.compressed_config import holds, mixed_in_bfloat16
from pocketlm.formats.packing import fills_bytes

OWN_FORMAT = ("pocketlm", "llama.cpp")  # targets whose artifacts are in our format
MIN_COLUMNS = 32  # a narrower weight fills no word of the packed formats


@dataclass(frozen=True)
class Grids:
    """The fitted grid of every compressed linear, and what was left out and why.

    Attributes:
        specs: Module path → grid that divides its columns; None where values stay floats.
        kept: Module path → why it keeps its precision.
        notes: Module path → what was changed about its groups.
        format_name: The format that can hold all of it.
        inputs: Module path → how its inputs are rounded, of the linears whose are.
        sparsity: How many weights are pruned; None: none.
        counts: Module path → how many weights pruning keeps.
        factoring: All steps of a recipe with one that makes factors; else empty.
        ends: Module path → grid, of embedding and head where they are compressed.
        untied: Whether a head that was tied to the embedding is stored apart from it.
    """

    specs: Mapping[str, QuantSpec | None]
    kept: Mapping[str, str]
    notes: Mapping[str, str]
    format_name: str
    inputs: Mapping[str, ActivationSpec] = field(default_factory=dict)
    sparsity: SparsitySpec | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    factoring: tuple[Step, ...] = ()
    ends: Mapping[str, QuantSpec] = field(default_factory=dict)
    untied: bool = False

    @property
    def quantized(self) -> dict[str, QuantSpec]:
        """The grids of the linears that are quantized."""
        return {name: spec for name, spec in self.specs.items() if spec is not None}

    @property
    def compact(self) -> bool:
        """Whether only kept weights are stored; else zeros are stored like other values."""
        return self.sparsity is not None and self.format_name == "pocketlm"

    def stored(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> WeightSpec:
        """In what form a linear will be stored, before anything is known but the recipe.

        Args:
            name: Module path.
            shape: (O, I).
            dtype: Of values that stay floats.
        """
        kind: Any = str(dtype).removeprefix("torch.")
        form: WeightSpec
        form = values = self.specs[name] or DenseSpec(dtype=kind)
        if self.compact and self.sparsity is not None:
            kept, pattern = self.counts[name], self.sparsity.pattern
            form = SparseSpec(values=values, kept=kept, pattern=pattern)
        if not self.factoring:
            return form
        half = str(scale_dtype_for(dtype)).removeprefix("torch.")
        return predicted_form(self.factoring, name, shape, self.specs[name], form, half)


def pruning_step(steps: Sequence[Step]) -> PruningStep | None:
    """A recipe's last step that prunes; None where none does."""
    pruning: list[Any] = [step for step in steps if "mask" in step.makes]
    return pruning[-1] if pruning else None


def choose_grids(
    shapes: Mapping[str, tuple[int, int]],
    refused: bool,
    recipe: Recipe,
    target: str,
    steps: Sequence[Step] = (),
    ends: Sequence[End] = (),
    shortcuts: Collection[str] = (),
) -> Grids:
    """Fits the recipe's grids to the linears and checks them against the target's rules.

    Args:
        shapes: (O, I) of every linear, by module path.
        refused: Whether the target cannot load the model's linears in compressed-tensors' form.
        recipe: Grids, overrides and what to ignore.
        target: Engine that must load the result.
        steps: The recipe's steps, options checked.
        ends: Embedding and head.
        shortcuts: Matrices between blocks, which only our own format holds.

    Returns:
        The grids; group sizes that do not divide are replaced and noted.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left to compress.
        UnsupportedLayer: If the target cannot load a layer's grid, or the format.
    """
    names = {name for end in ends for name in (end.name, end.tied_name) if name is not None}
    _require_matches(recipe, {*shapes, *names})
    capability(target)
    pruning = pruning_step(steps)
    sparsity = None if pruning is None else pruning.sparsity
    counts: dict[str, int] = {}
    factoring = tuple(steps) if _factorises(steps) else ()
    format_name = _format_of(recipe, refused, target, sparsity)
    chosen = choose_ends(ends, recipe, target)
    if factoring or any(end.name in chosen for end in ends if end.embeds):
        format_name = "pocketlm"  # no engine loads factors, or an embedding, from its own format
    if shortcuts:
        check_shortcuts(target, next(iter(shortcuts)))
        format_name = "pocketlm"
    specs: dict[str, QuantSpec | None] = {}
    kept: dict[str, str] = {}
    notes: dict[str, str] = {}
    inputs: dict[str, ActivationSpec] = {}
    columns = columns_to_fit(shapes, target)
    require_a_fit(recipe, columns)
    for name, shape in shapes.items():
        asked = recipe.spec_for(name)
        if recipe.ignores(name):
            kept[name] = "the recipe ignores it"
            continue
        if pruning is not None:
            pruning.sparsity_of(name).check(shape[1], name)
            counts[name] = pruning.kept(name, shape)
        if asked is None:
            specs[name] = None
        elif shape[1] < MIN_COLUMNS:
            kept[name] = f"only {shape[1]} columns; the format needs {MIN_COLUMNS}"
        elif not (fitted := fitted_grid(asked, columns[name], target)).fits(shape[1]):
            kept[name] = (
                f"groups of {fitted.group_size}, as {fitted.name} has them, do not divide "
                f"{shape[1]} columns"
            )
        elif fitted.type != "int" and not fills_bytes(shape[1], fitted.bits):
            kept[name] = f"{shape[1]} codes of {fitted.bits} bits do not fill whole bytes"
        else:
            if fitted != asked:
                notes[name] = fitting_note(asked, fitted, columns[name])
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
    quantized = {name: spec for name, spec in specs.items() if spec is not None}
    floats = [name for name in specs if name not in quantized]
    check_model({**quantized, **chosen}, [*kept, *floats], target, inputs)
    for end in ends:
        notes.update(check_end_grid(end, chosen, recipe, format_name, target))
    _refuse_own_experts(format_name, quantized, target, recipe.activations)
    for name in mixed_in_bfloat16(quantized) if target == "transformers" else ():
        said = f"transformers decodes {quantized[name].name} to bfloat16: load it in that dtype."
        notes[name] = f"{notes[name]} {said}" if name in notes else said
    untied = any(end.tied_name in chosen for end in ends)
    grids = Grids(
        specs, kept, notes, format_name, inputs, sparsity, counts, factoring, chosen, untied
    )
    for name, text in check_factors(grids, shapes, target).items():
        notes[name] = f"{notes[name]} {text}" if name in notes else text
    return grids


def _factorises(steps: Sequence[Step]) -> bool:
    """Whether a step makes factors, and its options ask for some."""
    making: list[Any] = [step for step in steps if "factors" in step.makes]
    return not all(step.idle for step in making)


def _format_of(recipe: Recipe, refused: bool, target: str, sparsity: SparsitySpec | None) -> str:
    """The first format that holds the whole recipe: an engine's own before ours."""
    asked = [spec for spec in (recipe.weights, *recipe.overrides.values()) if spec is not None]
    if target in OWN_FORMAT and (asked or sparsity is not None):
        return "pocketlm"
    if not asked:
        return "dense"
    return "pocketlm" if refused or not _all_held(asked, recipe) else "compressed-tensors"


def _all_held(specs: Sequence[QuantSpec], recipe: Recipe) -> bool:
    """Whether compressed-tensors can say and store all that a recipe asks for."""
    return all(holds(spec, recipe.activations) for spec in specs)


def _refuse_own_experts(
    format_name: str,
    specs: Mapping[str, QuantSpec],
    target: str,
    activations: ActivationSpec | None,
) -> None:
    """Transformers' fused experts get the weights of our format, and round no inputs."""
    own = format_name == "pocketlm" and activations is not None and activations.outliers is not None
    for name in specs if own and target == "transformers" else ():
        if is_expert(name):
            raise UnsupportedLayer(
                "is an expert, and transformers' fused experts round no inputs.",
                where=name,
                remedy="Ignore the experts, or choose --target pocketlm.",
            )


def _require_matches(recipe: Recipe, shapes: Collection[str]) -> None:
    for pattern in (*recipe.ignore, *recipe.overrides):
        if pattern == "lm_head" or any(matches(pattern, name) for name in shapes):
            continue
        leaves = {name.rsplit(".", 1)[-1] for name in shapes}
        raise ConfigError(
            f"the pattern '{pattern}' matches no linear.",
            where="recipe",
            remedy=nearest(pattern, shapes if pattern.count(".") > 1 else leaves),
        )


def linear_bits(
    spec: WeightSpec, shape: tuple[int, int], inputs: ActivationSpec | None = None
) -> int:
    """Stored bits of a linear: codes, scales, zero points, and what rounds its inputs.

    Args:
        spec: In what form it is.
        shape: (O, I).
        inputs: How its inputs are rounded; None: not at all.
    """
    return spec.stored_bits(shape) + (0 if inputs is None else inputs.stored_bits)


def grid_text(spec: WeightSpec | None) -> str:
    """A number format: ``4 bits, symmetric, groups of 64``, ``NVFP4, groups of 16``."""
    if spec is None or isinstance(spec, DenseSpec):
        return "values as floats"
    if isinstance(spec, LowRankSpec):
        factors = dict.fromkeys(map(grid_text, (spec.left, spec.right)))
        return f"two thin factors, {' and '.join(factors)}"
    if isinstance(spec, SumSpec):
        return f"{grid_text(spec.base)}, plus {grid_text(spec.low)}"
    if isinstance(spec, SparseSpec):
        form = "any" if spec.pattern is None else f"{spec.pattern[0]} of {spec.pattern[1]}"
        return f"{grid_text(spec.values)}, {form} kept"
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


def factors_note(grids: Grids, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """How large the factors are, and what runs them; None where nothing is factorised.

    Args:
        grids: The fitted grids.
        shapes: (O, I) of every linear, by module path.
    """
    if not grids.factoring:
        return None
    ranks: list[int] = []
    before = after = 0
    for name in grids.specs:
        rows, columns = shapes[name]
        form = grids.stored(name, (rows, columns), torch.bfloat16)
        low = form.low if isinstance(form, SumSpec) else form
        before += rows * columns
        after += rows * columns if not isinstance(form, LowRankSpec) else 0
        if isinstance(low, LowRankSpec):
            ranks.append(low.rank)
            after += low.rank * (rows + columns)
    least, most = min(ranks), max(ranks)
    span = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"{len(ranks)} linears with factors of rank {span}: {after / before:.3f} times the "
        "multiplications of the linears in `pocketlm.load`; transformers multiplies the factors "
        "when it loads, and runs the dense product."
    )


def sparsity_note(grids: Grids) -> str | None:
    """What zeros are worth where the artifact is run; None where nothing is pruned."""
    sparsity = grids.sparsity
    if sparsity is None:
        return None
    stored = (
        "only kept weights are stored"
        if grids.compact
        else f"zeros are stored like other values ({grids.format_name}); "
        "--target pocketlm stores kept weights alone"
    )
    speed = (
        "faster only where an engine multiplies 2:4 on sparse tensor cores"
        if sparsity.pattern == (2, 4)
        else "no engine is faster for it, for want of a kernel that skips them"
    )
    return f"{sparsity.name} of the weights pruned: {stored}; {speed}."


def inputs_text(spec: ActivationSpec) -> str:
    """A rounding of inputs in words, such as ``inputs in 8 bits, one scale a token``."""
    kind = "FP8" if spec.type == "float" else f"{spec.bits} bits"
    shared = {
        "token": "one scale a token",
        "group": f"one scale for {spec.group_size} columns of a token",
        "tensor": "one scale from calibration",
    }[spec.granularity]
    apart = "" if spec.outliers is None else f", from ±{spec.outliers:g} on in 16 bits"
    return f"inputs in {kind}, {'' if spec.symmetric else 'asymmetric, '}{shared}{apart}"


def scale_dtype_for(weight_dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of a linear's scales: bfloat16 beside bfloat16 weights, else float16."""
    return torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float16
