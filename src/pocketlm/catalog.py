"""Every method by name: one static table, imported on use. Third parties add theirs through the
entry point group `pocketlm.methods`.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points
from typing import Any

from pocketlm.core.errors import ConfigError, nearest

METHODS: dict[str, str] = {
    "rtn": "pocketlm.quant.rtn:Rtn",
    "clip": "pocketlm.quant.clip:Clip",
    "gptq": "pocketlm.quant.gptq:Gptq",
    "refine": "pocketlm.quant.refine:Refine",
    "hqq": "pocketlm.quant.hqq:Hqq",
    "llm_int8": "pocketlm.quant.llm_int8:LlmInt8",
    "awq": "pocketlm.quant.awq:Awq",
    "smoothquant": "pocketlm.quant.smoothquant:Smoothquant",
    "correct": "pocketlm.quant.correct:Correct",
    "autoround": "pocketlm.quant.autoround:Autoround",
    "learned_clip": "pocketlm.quant.learned_clip:LearnedClip",
    "lkd": "pocketlm.quant.lkd:Lkd",
    "magnitude": "pocketlm.prune.steps:Magnitude",
    "wanda": "pocketlm.prune.steps:Wanda",
    "ria": "pocketlm.prune.steps:Ria",
    "esparse": "pocketlm.prune.steps:Esparse",
    "gblm": "pocketlm.prune.steps:Gblm",
    "dsnot": "pocketlm.prune.steps:Dsnot",
    "sparsegpt": "pocketlm.prune.updates:Sparsegpt",
    "sparsegpt_joint": "pocketlm.prune.updates:SparsegptJoint",
    "alps": "pocketlm.prune.updates:Alps",
    "tune": "pocketlm.prune.tune:Tune",
    "svd": "pocketlm.lowrank.svd:Svd",
    "fwsvd": "pocketlm.lowrank.fwsvd:Fwsvd",
    "asvd": "pocketlm.lowrank.asvd:Asvd",
    "svd_llm": "pocketlm.lowrank.svd_llm:SvdLlm",
    "laser": "pocketlm.lowrank.laser:Laser",
    "losparse": "pocketlm.lowrank.losparse:Losparse",
    "lqer": "pocketlm.lowrank.lqer:Lqer",
    "lorc": "pocketlm.lowrank.lqer:Lorc",
    "caldera": "pocketlm.lowrank.caldera:Caldera",
    "depth": "pocketlm.prune.depth:Depth",
    "shortgpt": "pocketlm.prune.depth:Shortgpt",
    "flap": "pocketlm.prune.importance.flap:Flap",
    "wanda_sp": "pocketlm.prune.importance.wanda_sp:WandaSp",
    "minitron": "pocketlm.prune.importance.minitron:Minitron",
    "slicegpt": "pocketlm.prune.slicegpt:Slicegpt",
    "experts": "pocketlm.prune.experts:Experts",
    "permute": "pocketlm.prune.permute:Permute",
    "laco": "pocketlm.prune.laco:Laco",
    "llm_pruner": "pocketlm.prune.importance.taylor:LlmPruner",
}


def known_methods() -> dict[str, str]:
    """Method name → "module:Class", our own and installed third parties'."""
    return {**_third_party(), **METHODS}


@functools.cache
def _third_party() -> dict[str, str]:
    """Reads the metadata of every installed package, which takes longer than a small step."""
    return {point.name: point.value for point in entry_points(group="pocketlm.methods")}


def method_class(name: str) -> Any:
    """The config class of a method.

    Raises:
        ConfigError: If no method has that name.
    """
    table = known_methods()
    if name not in table:
        raise ConfigError(f"unknown method '{name}'.", where="recipe", remedy=nearest(name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build_step(method: str, options: dict[str, Any]) -> Any:
    """One step of a recipe with its options checked.

    Raises:
        ConfigError: On an unknown method, option or value.
    """
    return method_class(method).parse(options, where=f"recipe step '{method}'")
