"""Refuses what an engine is known not to load or run, before any weight is read.

What is known of each engine is in `targets.py`, whose names are found here too.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.formats.targets import (
    FUSED,
    Capability,
    capabilities,
    capability,
    is_expert,
    target_name,
    unit_of,
)

__all__ = [
    "FUSED", "Capability", "capabilities", "capability", "check_end", "check_layer", "check_model",
    "check_shortcuts", "is_expert", "target_name", "unit_of",
]  # fmt: skip


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
        remedy = f"It loads {readable}."
        if spec.type != "int" and known.formats:  # most likely a scheme was chosen, not a format
            remedy = (
                f"It runs integers, such as W4A16, and {', '.join(known.floats) or 'no floats'}."
            )
        raise refuse(
            f"{target} does not load the format {format_name}, in which {spec.name} is written.",
            remedy,
        )
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
        if is_expert(module):
            experts[unit_of(module, target)].append(module)
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
        elif spec is not None and spec.type == "float" and spec.name not in known.expert_floats:
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
