"""What each engine loads and runs of the formats written here, as data with its evidence.

`capabilities.json` states only what was read in an engine's source or seen in a run; null means
that nobody has looked. The checks refuse what is known not to work, before any weight is read.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files

from pocketlm.core.errors import ConfigError, UnsupportedLayer, nearest
from pocketlm.core.spec import ActivationSpec, QuantSpec, Strict

# Linears that vLLM runs as one: they need one grid. By the last part of the module path.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT = re.compile(r"(.*?\bexperts)\.\d+\.")


class IntegerBits(Strict):
    """Bits of integers that are run, without and with zero points."""

    symmetric_bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]


class Capability(Strict):
    """What one target takes.

    Attributes:
        formats: Names of formats it loads.
        symmetric_bits: Bits of integers it runs without zero points.
        asymmetric_bits: Bits of integers it runs with zero points.
        floats: Names of the other number formats it runs, as `QuantSpec.name` spells them.
        expert_floats: Those of them that it runs for experts.
        whole_blocks: Whether blocks (FP8_BLOCK) must divide the columns, and the rows of linears
            that are run as one.
        by_format: Format → what replaces these bits where a weight is stored in it.
        group_sizes: Group sizes its integer kernels take; None: any that divides the columns.
        per_channel: Whether one scale for a whole row is taken.
        columns_multiple: Columns must be a multiple of this.
        rows_multiple: Rows must be a multiple of this.
        fused_share_one_grid: Whether q, k, v and gate, up need one grid.
        asymmetric_needs_one_grid: Whether a model with zero points may have only one grid.
        asymmetric_experts: Whether zero points of experts are used.
        inputs: How linears' inputs may be rounded, as `ActivationSpec.name` spells it → number
            formats of weights beside which that is run: `QuantSpec.name`, of integers with
            ``_CHANNEL`` (a scale for each row) or ``_GROUP``; patterns.
        heads: Formats in which it loads a compressed head.
        embeddings: Formats in which it loads a compressed embedding.
        expert_inputs: Which of these roundings are run for experts; None: none, their inputs stay
            as they come where others are rounded.
        activation_order: Whether groups whose columns lie scattered (``g_idx``) are run.
        negative_scales: Whether scales below zero compute correctly; None: not known.
        minimum_versions: Package → oldest release.
        minimum_versions_3_5_6_7_bits: The same where a grid has 3, 5, 6 or 7 bits.
        evidence: Where all this is known from.
    """

    formats: tuple[str, ...]
    symmetric_bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]
    by_format: dict[str, IntegerBits]
    floats: tuple[str, ...]
    expert_floats: tuple[str, ...]
    whole_blocks: bool
    group_sizes: tuple[int, ...] | None
    per_channel: bool
    columns_multiple: int
    rows_multiple: int
    fused_share_one_grid: bool
    asymmetric_needs_one_grid: bool
    asymmetric_experts: bool
    inputs: dict[str, tuple[str, ...]]
    heads: tuple[str, ...]
    embeddings: tuple[str, ...]
    expert_inputs: tuple[str, ...] | None
    activation_order: bool
    negative_scales: bool | None
    minimum_versions: dict[str, str]
    minimum_versions_3_5_6_7_bits: dict[str, str]
    evidence: str

    def versions_for(self, specs: Iterable[QuantSpec]) -> dict[str, str]:
        """Package → oldest release that reads these grids."""
        odd = any(spec.bits in (3, 5, 6, 7) for spec in specs)
        return self.minimum_versions | (self.minimum_versions_3_5_6_7_bits if odd else {})


@cache
def capabilities() -> Mapping[str, Capability]:
    """Every known target, by name."""
    text = files("pocketlm.formats").joinpath("capabilities.json").read_text("utf-8")
    return {name: Capability.parse(data, where=name) for name, data in json.loads(text).items()}


ALIASES = {"gguf": "llama.cpp"}  # of targets


def target_name(target: str) -> str:
    """The name of a target by any of its names."""
    return ALIASES.get(target, target)


def capability(target: str) -> Capability:
    """What one target takes, by any of its names.

    Raises:
        ConfigError: If the target is unknown.
    """
    known, name = capabilities(), target_name(target)
    if name not in known:
        raise ConfigError(
            f"unknown target '{target}'.", where="--target", remedy=nearest(target, known)
        )
    return known[name]


def is_expert(module: str) -> bool:
    """Whether a module path is that of a linear of an expert."""
    return _EXPERT.match(module) is not None


def unit_of(module: str, target: str) -> str:
    """The name of what a linear shares its grid with: linears of one unit must have one grid.

    Args:
        module: Module path of a linear.
        target: Name of the engine.

    Returns:
        The path of the layer's experts, of the layer that the target fuses, or its own.

    Raises:
        ConfigError: If the target is unknown.
    """
    expert = _EXPERT.match(module)
    if expert:
        return expert[1]
    parent, _, leaf = module.rpartition(".")
    if capability(target).fused_share_one_grid:
        for fused in FUSED:
            if leaf in fused:
                return f"{parent}.{'+'.join(fused)}"
    return module


def check_layer(
    format_name: str,
    spec: QuantSpec,
    shape: tuple[int, int],
    target: str,
    where: str | None = None,
    activations: ActivationSpec | None = None,
) -> None:
    """Refuses a number format, or a rounding of inputs, that the target cannot load or run.

    Args:
        format_name: Name of the format it would be written in.
        spec: The number format.
        shape: (O, I) of the weight.
        target: Name of the engine.
        where: Module path for the message.
        activations: How the linear's inputs are rounded; None: not at all.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    known, (rows, columns) = capability(target), shape

    def refuse(what: str, remedy: str) -> UnsupportedLayer:
        return UnsupportedLayer(what, where=where, remedy=remedy)

    if format_name not in known.formats:
        readable = ", ".join(known.formats) or "none of the formats written here"
        raise refuse(f"{target} does not load the format {format_name}.", f"It loads {readable}.")
    if not spec.fits(columns):
        fitted = spec.fit(columns)
        raise refuse(
            f"groups of {spec.group_size} do not divide {columns} columns.",
            "Put the layer into ignore." if fitted == spec else f"The grid {fitted!r} does.",
        )
    if activations is not None:
        _check_inputs(known, spec, shape, target, where, activations)
        return
    if spec.type != "int":
        if spec.name not in known.floats:
            listed = ", ".join(known.floats) or "integers"
            remedy = f"It runs {listed}."
            if spec.type in ("k", "iq4_nl"):
                remedy = "It is llama.cpp's: give --target llama.cpp, then export --to gguf."
            raise refuse(f"{target} does not run {spec.name}.", remedy)
        if known.whole_blocks and spec.name == "FP8_BLOCK":
            _demand_whole_blocks(spec, shape, target, where)
        return
    bits = known.by_format.get(format_name, known)
    allowed = bits.symmetric_bits if spec.symmetric else bits.asymmetric_bits
    kind = "symmetric" if spec.symmetric else "asymmetric"
    if spec.bits not in allowed:
        listed = ", ".join(str(bits) for bits in allowed)
        raise refuse(
            f"{target} has no kernel for {kind} {spec.bits} bits.", f"Choose one of {listed}."
        )
    if spec.group_size is None and not known.per_channel:
        raise refuse(f"{target} needs groups.", "Give --group-size.")
    sizes = known.group_sizes
    if spec.group_size is not None and sizes is not None and spec.group_size not in sizes:
        listed = ", ".join(str(size) for size in sizes)
        raise refuse(
            f"{target} has no kernel for groups of {spec.group_size}.", f"Choose one of {listed}."
        )
    if columns % known.columns_multiple or rows % known.rows_multiple:
        raise refuse(
            f"{target} needs rows in multiples of {known.rows_multiple} and columns of "
            f"{known.columns_multiple}; this weight is {rows} x {columns}.",
            "Put the layer into ignore, or choose another target.",
        )
    if known.fused_share_one_grid and not spec.symmetric and rows * spec.bits % 32:
        raise refuse(
            f"zero points of {rows} rows do not fill whole words, which {target} needs where it "
            "fuses layers.",
            "Make the grid symmetric.",
        )


def check_end(
    format_name: str,
    spec: QuantSpec,
    shape: tuple[int, int],
    target: str,
    where: str,
    *,
    embeds: bool,
) -> None:
    """Refuses a grid of an embedding or a head that is not written here, or that a target lacks.

    Args:
        format_name: Name of the format it would be written in.
        spec: The number format.
        shape: (V, D).
        target: Name of the engine.
        where: Module path for the message.
        embeds: Whether tokens are looked up in it.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    known = capability(target)
    if not spec.by_rows:
        raise UnsupportedLayer(
            f"an embedding or head is compressed row by row, and {spec.name} as asked for has zero "
            "points, or scales that rows share.",
            where=where,
            remedy="Give it symmetric integers, NF4, MXFP4, MXFP8 or FP8_CHANNEL.",
        )
    if format_name not in (known.embeddings if embeds else known.heads):
        what = "embedding" if embeds else "head"
        raise UnsupportedLayer(
            f"{target} loads no compressed {what} from the format {format_name}.",
            where=where,
            remedy=f"Leave the {what} as it is, or choose another target.",
        )
    check_layer(format_name, spec, shape, target, where)


def check_shortcuts(target: str, where: str) -> None:
    """Refuses matrices between blocks, which only our own format holds, where a target lacks it.

    Args:
        target: Name of the engine.
        where: Module path of one, for the message.

    Raises:
        UnsupportedLayer: If the target does not load the format pocketlm.
        ConfigError: If the target is unknown.
    """
    if "pocketlm" not in capability(target).formats:
        raise UnsupportedLayer(
            f"passes the stream from one block's basis to the next, which {target} cannot do.",
            where=where,
            remedy="Give all blocks one basis (rotation: shared), or choose --target transformers.",
        )


def _check_inputs(
    known: Capability,
    spec: QuantSpec,
    shape: tuple[int, int],
    target: str,
    where: str | None,
    activations: ActivationSpec,
) -> None:
    """Refuses a rounding of inputs beside these weights; 16-bit inputs have other kernels."""
    weights = spec.name
    if spec.type == "int":
        weights += "_CHANNEL" if spec.group_size is None else "_GROUP"
    patterns = known.inputs.get(activations.name)
    if patterns is None:
        listed = ", ".join(known.inputs) or "unrounded inputs only"
        raise UnsupportedLayer(
            f"{target} does not round inputs as {activations.name}.",
            where=where,
            remedy=f"It runs {listed}.",
        )
    if not any(fnmatch.fnmatchcase(weights, pattern) for pattern in patterns):
        raise UnsupportedLayer(
            f"{target} has no kernel for {weights} weights beside {activations.name} inputs.",
            where=where,
            remedy=f"Choose one of {', '.join(patterns)} for the weights.",
        )
    if not spec.symmetric:
        raise UnsupportedLayer(
            "has zero points, which no engine runs beside rounded inputs.",
            where=where,
            remedy="Make the grid symmetric.",
        )
    group = activations.group_size
    if group is not None and shape[1] % group:
        raise UnsupportedLayer(
            f"inputs in groups of {group} do not divide {shape[1]} columns.",
            where=where,
            remedy="Round them per token (FP8_DYNAMIC, W8A8), or put the layer into ignore.",
        )
    if known.whole_blocks and spec.name == "FP8_BLOCK":
        _demand_whole_blocks(spec, shape, target, where)


def _demand_whole_blocks(
    spec: QuantSpec, shape: tuple[int, int], target: str, where: str | None
) -> None:
    (rows, columns), (height, width) = shape, (spec.group_rows or 1, spec.group_size or 1)
    leaf = (where or "").rpartition(".")[2]
    fused = any(leaf in group for group in FUSED)
    if columns % width or (fused and rows % height):
        raise UnsupportedLayer(
            f"{target} needs whole blocks of {height} x {width}; this weight is {rows} x "
            f"{columns}.",
            where=where,
            remedy="Choose FP8_CHANNEL, or put the layer into ignore.",
        )


def check_model(
    specs: Mapping[str, QuantSpec],
    ignored: Iterable[str],
    target: str,
    inputs: Mapping[str, ActivationSpec] | None = None,
) -> None:
    """Refuses combinations of grids that the target cannot load, though each layer alone is fine.

    Args:
        specs: Module path → grid, of every compressed linear.
        ignored: Module paths of the linears that are kept.
        target: Name of the engine.
        inputs: Module path → how its inputs are rounded, of the linears whose are.

    Raises:
        UnsupportedLayer: Fused linears with different grids, or experts that differ.
        ConfigError: If the target is unknown.
    """
    known = capability(target)
    grids: dict[str, QuantSpec | None] = {**dict.fromkeys(ignored), **specs}
    if known.fused_share_one_grid:
        for module in specs:
            parent, _, leaf = module.rpartition(".")
            for fused in (group for group in FUSED if leaf in group):
                siblings = [f"{parent}.{part}" for part in fused if f"{parent}.{part}" in grids]
                _demand_one_grid(siblings, grids, f"{target} runs them as one layer")
    distinct = set(specs.values())
    if known.asymmetric_needs_one_grid and len(distinct) > 1:
        for module, spec in specs.items():
            if not spec.symmetric:
                raise UnsupportedLayer(
                    f"has zero points, and {target} decodes a model with zero points by one grid.",
                    where=module,
                    remedy="Make the grid symmetric, or give every linear the same grid.",
                )
    experts: dict[str, list[str]] = defaultdict(list)
    for module in grids:
        found = _EXPERT.match(module)
        if found:
            experts[found[1]].append(module)
    for members in experts.values():
        _demand_one_grid(members, grids, f"{target} stacks the experts of a layer")
        spec, activations = grids[members[0]], (inputs or {}).get(members[0])
        if activations is not None:
            if activations.name not in (known.expert_inputs or ()):
                raise UnsupportedLayer(
                    f"{target} does not round inputs of experts as {activations.name}.",
                    where=members[0],
                    remedy="Put the experts into ignore, or choose another scheme.",
                )
        elif spec is not None and spec.type != "int" and spec.name not in known.expert_floats:
            raise UnsupportedLayer(
                f"{target} does not run {spec.name} for experts.",
                where=members[0],
                remedy="Override the experts with another format, such as W4A16, or ignore them.",
            )
        if spec is not None and not spec.symmetric and not known.asymmetric_experts:
            raise UnsupportedLayer(
                f"{target} does not use zero points of experts.",
                where=members[0],
                remedy="Make the grid of the experts symmetric.",
            )


def _demand_one_grid(
    modules: list[str], grids: Mapping[str, QuantSpec | None], reason: str
) -> None:
    different = [module for module in modules if grids[module] != grids[modules[0]]]
    if different:
        raise UnsupportedLayer(
            f"has another grid than {modules[0]}, but {reason}.",
            where=different[0],
            remedy="Give both the same grid, or ignore both.",
        )
