"""What each engine loads and runs of the formats written here, as data with its evidence.

`capabilities.json` states only what was read in an engine's source or seen in a run; null means
that nobody has looked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files

from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import QuantSpec, Strict

# Linears that vLLM runs as one: they need one grid. By the last part of the module path.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPERT = re.compile(r"(.*?\bexperts)\.\d+\.")


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
        experts_by_part: Whether each part of a block's experts (gate, up, down) is a stack of its
            own; else all experts of a block need one grid.
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
    experts_by_part: bool
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
    return EXPERT.match(module) is not None


def unit_of(module: str, target: str) -> str:
    """The name of what a linear shares its grid with: linears of one unit must have one grid.

    Args:
        module: Module path of a linear.
        target: Name of the engine.

    Returns:
        The path of the layer's experts, or of one part of them (``mlp.experts.down_proj``); of the
        layer that the target fuses; or its own.

    Raises:
        ConfigError: If the target is unknown.
    """
    expert = EXPERT.match(module)
    parent, _, leaf = module.rpartition(".")
    if expert:
        return f"{expert[1]}.{leaf}" if capability(target).experts_by_part else expert[1]
    if capability(target).fused_share_one_grid:
        for fused in FUSED:
            if leaf in fused:
                return f"{parent}.{'+'.join(fused)}"
    return module
