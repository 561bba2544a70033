"""From names, files and flags to a recipe. Presets are ordinary recipes under a name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pocketlm import catalog
from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import (
    INPUTS,
    SCHEMES,
    QuantSpec,
    Recipe,
    StepSpec,
    parse_inputs,
    parse_scheme,
)
from pocketlm.core.stored import SparsitySpec
from pocketlm.formats.gguf_mix import MIXES
from pocketlm.formats.gguf_types import FLOATS, SPECS

DEFAULT = "w4a16"
PRUNING = "sparsegpt"  # what --sparsity stands for

CORRECTED = (
    *(StepSpec(method=name) for name in ("correct", "clip", "gptq")),
    StepSpec(method="refine", options={"rounds": 3}),
)

# A method's name stands for the steps that make the best of it.
CHAINS: dict[str, tuple[StepSpec, ...]] = {
    "gptq": tuple(StepSpec(method=name) for name in ("clip", "gptq", "refine")),
    "clip": tuple(StepSpec(method=name) for name in ("clip", "rtn")),
    "awq": tuple(StepSpec(method=name) for name in ("awq", "clip", "rtn")),
    "autoround": tuple(StepSpec(method=name) for name in ("clip", "gptq", "refine", "autoround")),
    "smoothquant": tuple(StepSpec(method=name) for name in ("smoothquant", "clip", "gptq")),
    "correct": CORRECTED,
    "sparsegpt": (StepSpec(method="sparsegpt"),),
    "sparsegpt_joint": tuple(StepSpec(method=n) for n in ("clip", "sparsegpt_joint", "refine")),
    "alps": tuple(StepSpec(method=name) for name in ("correct", "alps")),
    "tune": tuple(StepSpec(method=name) for name in ("correct", "alps", "tune")),
    "lkd": (*CORRECTED, StepSpec(method="lkd")),
    "lqer": tuple(StepSpec(method=name) for name in ("clip", "gptq", "refine", "lqer")),
    "lorc": tuple(StepSpec(method=name) for name in ("rtn", "lorc")),
    "caldera": tuple(
        StepSpec(method=name) for name in ("clip", "gptq", "caldera", "gptq", "caldera")
    ),
}


# What compresses embedding and head, which no calibration data reaches as a linear's inputs.
END_STEPS = tuple(StepSpec(method=name) for name in ("clip", "rtn"))

# A method that was made for one scheme brings it, unless another is given.
METHOD_SCHEMES = {"llm_int8": "LLM_INT8"}

QUANTIZED_MIXES = tuple(mix for mix, (base, _) in MIXES.items() if base not in FLOATS)

# What makes the best of a scheme that rounds inputs too (docs/experiments.md); else gptq's chain.
SCHEME_STEPS: dict[str, tuple[StepSpec, ...]] = {
    "W8A8": tuple(StepSpec(method=name) for name in ("smoothquant", "gptq")),
    "W8A8_STATIC": tuple(StepSpec(method=name) for name in ("smoothquant", "gptq")),
    "W4A8": CHAINS["smoothquant"],
    "LLM_INT8": (StepSpec(method="llm_int8"),),
}


def presets() -> dict[str, Recipe]:
    """Recipes by name: each scheme in small letters (w4a16, w8a8, nvfp4, …), with its method.

    The mixtures of GGUF files (q4_k_m, …) are among them.
    """
    schemes = {name.lower(): _preset(name) for name in SCHEMES}
    return schemes | {mix.lower(): _mixture(mix) for mix in QUANTIZED_MIXES}


def _mixture(mix: str) -> Recipe:
    base, _ = MIXES[mix]
    return Recipe(steps=CHAINS["gptq"], weights=SPECS[base], mix=mix)


def _preset(scheme: str) -> Recipe:
    steps = SCHEME_STEPS.get(scheme, CHAINS["gptq"])
    return Recipe(steps=steps, weights=SCHEMES[scheme], activations=INPUTS.get(scheme))


def _chain(method: str, weights: QuantSpec | None) -> Recipe:
    catalog.method_class(method)
    steps = CHAINS.get(method, (StepSpec(method=method),))
    return Recipe(steps=steps, weights=weights)


def _makes(step: StepSpec, what: str) -> bool:
    return what in catalog.build_step(step.method, step.options).makes


def _takes(step: StepSpec, option: str) -> bool:
    return option in catalog.method_class(step.method).model_fields


def _pruned(recipe: Recipe, sparsity: SparsitySpec) -> Recipe:
    """The recipe with a sparsity for its steps that prune; with sparsegpt where none does.

    Steps that make a smaller model, or factors, take a share as their ratio, unless they say one.
    """
    steps = recipe.steps
    smaller = [step for step in steps if _takes(step, "ratio")]
    if smaller and sparsity.ratio is not None and not any(_makes(s, "mask") for s in steps):
        told = {"ratio": sparsity.ratio}  # a share of blocks, channels or parameters instead
        steps = tuple(
            StepSpec(method=s.method, options={**told, **s.options}) if s in smaller else s
            for s in steps
        )
        return recipe.model_copy(update={"steps": steps})
    if not any(_makes(step, "mask") for step in steps):
        first = next((i for i, s in enumerate(steps) if _makes(s, "grid")), len(steps))
        steps = (*steps[:first], *CHAINS[PRUNING], *steps[first:])
    said = {"sparsity": sparsity.name}
    steps = tuple(
        StepSpec(method=s.method, options={**s.options, **said}) if _takes(s, "sparsity") else s
        for s in steps
    )
    return recipe.model_copy(update={"steps": steps})


def read_recipe(recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """A recipe from whatever names one.

    Args:
        recipe: A preset's name, a YAML file, plain data, or a recipe.

    Returns:
        The recipe, its steps checked against the catalog.

    Raises:
        ConfigError: If the name, a key, a method or an option is unknown.
    """
    if isinstance(recipe, str) and re.fullmatch(r"\d+:\d+", recipe):
        recipe = _pruned(_chain(PRUNING, None), SparsitySpec.read(recipe, "--recipe"))
    elif isinstance(recipe, str) and recipe.lower() in presets():
        recipe = presets()[recipe.lower()]
    elif isinstance(recipe, str | Path):
        recipe = Recipe.parse(_read_yaml(recipe), where=str(recipe))
    elif isinstance(recipe, dict):
        recipe = Recipe.parse(recipe, where="recipe")
    for step in recipe.steps:
        catalog.build_step(step.method, step.options)
    return _with_scheme(_without_grid(recipe))


def _without_grid(recipe: Recipe) -> Recipe:
    """The recipe without a number format where it names none and only prunes or factorises."""
    made = frozenset[str]().union(*(catalog.method_class(s.method).makes for s in recipe.steps))
    if "weights" in recipe.model_fields_set or "grid" in made or not made & {"mask", "factors"}:
        return recipe
    return recipe.model_copy(update={"weights": None})


def _with_scheme(recipe: Recipe) -> Recipe:
    """The recipe with the scheme that one of its steps was made for, where it says no other.

    Raises:
        ConfigError: If it rounds inputs in a way that contradicts the step.
    """
    for step in recipe.steps:
        if step.method not in METHOD_SCHEMES:
            continue
        scheme = METHOD_SCHEMES[step.method]
        changes: dict[str, Any] = {}
        if recipe.activations is None:
            changes["activations"] = INPUTS[scheme]
        elif recipe.activations.outliers is None:
            raise ConfigError(
                f"{step.method} keeps outliers of the inputs apart, the recipe's activations "
                "do not.",
                where="recipe",
                remedy="Set activations: {outliers: 6.0}, or take rtn.",
            )
        if "weights" not in recipe.model_fields_set:
            changes["weights"] = SCHEMES[scheme]
        recipe = recipe.model_copy(update=changes)
    return recipe


def _read_yaml(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if not path.is_file():
        remedy = nearest(str(recipe), presets()) + " Or give a YAML file."
        raise ConfigError(f"unknown recipe '{recipe}'.", where="--recipe", remedy=remedy)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {error}".split("\n")[0], where=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError("a recipe is a mapping with 'steps'.", where=str(path))
    return data


def build_recipe(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    method: str | None = None,
    scheme: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    ignore: tuple[str, ...] = (),
    sparsity: str | float | None = None,
) -> Recipe:
    """A recipe from flags, on top of a recipe or of the default.

    Args:
        recipe: What `read_recipe` takes; not together with `method`.
        method: A method's name, standing for its chain of steps.
        scheme: Such as W4A16, which leaves the groups to the recipe, NVFP4, or W8A8, which brings
            its own method where none is given.
        bits: Bits of a code.
        group_size: Columns that share a scale; -1 for whole rows.
        symmetric: Whether the grid is symmetric.
        ignore: Further patterns of linears to keep.
        sparsity: Share of zeros or N:M for the steps that prune. Without anything that asks for a
            number format it stands for sparsegpt alone; else pruning comes before quantization.

    Returns:
        The recipe.

    Raises:
        ConfigError: If something is unknown or contradicts something else.
    """
    if recipe is not None and method is not None:
        raise ConfigError(
            "a recipe already says which methods run.",
            where="--recipe and --method",
            remedy="Give one of them.",
        )
    if scheme is None and method is not None:
        scheme = METHOD_SCHEMES.get(method)
    if scheme is not None and ":" in scheme:  # 2:4 is a scheme too
        if sparsity not in (None, scheme):
            raise ConfigError("they contradict each other.", where="--scheme and --sparsity")
        scheme, sparsity = None, scheme
    asked_zeros = None if sparsity is None else SparsitySpec.read(sparsity, "--sparsity")
    said = (scheme, bits, group_size, symmetric)
    if recipe is None and all(flag is None for flag in said):
        if method is None and asked_zeros is not None:
            method = PRUNING
        if method is not None:
            chain = _chain(method, None)
            if not any(_makes(step, "grid") for step in chain.steps):
                pruned = chain if asked_zeros is None else _pruned(chain, asked_zeros)
                return pruned.model_copy(update={"ignore": (*chain.ignore, *ignore)})
    if scheme is not None and scheme.upper() in QUANTIZED_MIXES:
        return _in_mixture(
            recipe, method, scheme.upper(), (bits, group_size, symmetric), ignore, asked_zeros
        )
    inputs = None if scheme is None else parse_inputs(scheme)
    default = DEFAULT if scheme is None or inputs is None else scheme
    base = read_recipe(default if recipe is None else recipe)
    if method is not None:
        chain = _chain(method, base.weights)
        if not any(_makes(step, "grid") for step in chain.steps):  # it prunes: quantize after it
            chain = chain.model_copy(update={"steps": (*chain.steps, *base.steps)})
        base = chain.model_copy(update={"activations": base.activations})
    if asked_zeros is not None:
        base = _pruned(base, asked_zeros)
    grid = base.weights
    if grid is None:
        if any(flag is not None for flag in said):
            raise ConfigError(
                "the recipe quantizes nothing.",
                where="--recipe",
                remedy="Give its `weights` a number format there.",
            )
        return base.model_copy(update={"ignore": (*base.ignore, *ignore)})
    changes: dict[str, Any] = {}
    if scheme is not None:
        asked = parse_scheme(scheme)
        integers = asked.type == "int" and grid.type == "int" and inputs is None
        changes = {"bits": asked.bits} if integers else _fields(asked)
        base = _with_scheme(base.model_copy(update={"activations": inputs}))
    if bits is not None:
        if changes.get("bits", bits) != bits:
            raise ConfigError(
                f"{scheme} and {bits} bits contradict each other.",
                where="--scheme and --bits",
                remedy="Give one of them.",
            )
        changes["bits"] = bits
    if group_size is not None:
        changes["group_size"] = None if group_size == -1 else group_size
    if symmetric is not None:
        changes["symmetric"] = symmetric
    weights = QuantSpec.parse({**_fields(grid), **changes}, where="grid")
    return base.model_copy(update={"weights": weights, "ignore": (*base.ignore, *ignore)})


def scheme_bits(scheme: str) -> int | None:
    """Bits of a scheme's codes; None where it is a mixture of GGUF types.

    Raises:
        ConfigError: If the name is no known scheme.
    """
    return None if scheme.upper() in QUANTIZED_MIXES else parse_scheme(scheme).bits


def _in_mixture(
    recipe: str | Path | dict[str, Any] | Recipe | None,
    method: str | None,
    mix: str,
    grid: tuple[int | bool | None, ...],
    ignore: tuple[str, ...],
    zeros: SparsitySpec | None,
) -> Recipe:
    """The recipe for a mixture of GGUF types, which say bits and groups themselves."""
    if any(flag is not None for flag in grid):
        raise ConfigError(
            f"{mix} says bits and groups of every tensor.",
            where="--scheme",
            remedy="Leave out --bits, --group-size and --sym.",
        )
    made = _mixture(mix)
    if recipe is not None:
        said = {"weights": made.weights, "mix": mix}
        made = read_recipe(recipe).model_copy(update=said)
    elif method is not None:
        made = made.model_copy(update={"steps": _chain(method, None).steps})
    made = made if zeros is None else _pruned(made, zeros)
    return made.model_copy(update={"ignore": (*made.ignore, *ignore)})


def _fields(spec: QuantSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in QuantSpec.model_fields}
