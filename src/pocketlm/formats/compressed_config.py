"""The ``quantization_config`` of compressed-tensors: number formats in its words, and the targets.

A config group names its modules by pattern, its weights' number format, how its inputs are
quantized (none, unless the caller says so) and how the weights are stored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.formats.inputs import input_args

NAME = "compressed-tensors"
STORAGES = {
    "INT": "pack-quantized",
    "FP8": "float-quantized",
    "MXFP8": "mxfp8-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "NVFP4": "nvfp4-pack-quantized",
}
Group = tuple[QuantSpec, ActivationSpec | None]
_SCALE_DTYPES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}

# Decoded to bfloat16 by the library, whatever dtype the model is loaded in.
DECODED_IN_BFLOAT16 = ("MXFP4", "MXFP8", "NVFP4")


def storage(
    spec: QuantSpec, activations: ActivationSpec | None = None, where: str | None = None
) -> str:
    """The library's name for how a weight is stored.

    Args:
        spec: The weight's number format.
        activations: How the linear's inputs are rounded; None: not at all.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: If compressed-tensors has no storage for it.
    """
    if not holds(spec, activations):
        what = "inputs with outliers kept apart" if holds(spec) else spec.name
        raise UnsupportedLayer(
            f"{NAME} cannot hold {what}.",
            where=where,
            remedy="Choose a scheme of its own, such as W4A16, NVFP4 or W8A8.",
        )
    if spec.type == "int" and spec.bits == 8 and spec.symmetric and activations:
        return "int-quantized"
    return STORAGES["INT" if spec.type == "int" else spec.name.partition("_")[0]]


def holds(spec: QuantSpec, activations: ActivationSpec | None = None) -> bool:
    """Whether compressed-tensors has a storage for a number format and words for a rounding."""
    apart = activations is not None and activations.outliers is not None
    return spec.type in ("int", "float") and not apart


def config_section(
    specs: Mapping[str, QuantSpec],
    ignored: Sequence[str],
    inputs: Mapping[str, ActivationSpec] | None = None,
    kv_cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    One group for each distinct format. A single one targets ``Linear``; several name their modules
    (by pattern where a leaf name tells them apart), because engines that fuse q, k and v look at
    the class before the parts, and ``Linear`` would win there over a more exact name.

    Args:
        specs: Module path → number format, of every compressed linear.
        ignored: Module paths of every linear that is kept; ``lm_head`` is added where it is kept.
        inputs: Module path → how its inputs are rounded, of the linears whose are.
        kv_cache: How the cache is rounded, in the words of the format (`formats.kv_cache`).

    Returns:
        Plain JSON, deterministic.

    Raises:
        ConfigError: If nothing is compressed, or a module is both compressed and ignored.
    """
    if not specs:
        raise ConfigError("no linear is compressed; there is nothing to configure.")
    both = sorted(set(specs) & set(ignored))
    if both:
        raise ConfigError("a module is compressed and ignored.", where=both[0])
    ignore = list(dict.fromkeys(ignored))
    if "lm_head" not in specs and "lm_head" not in ignore:
        ignore.append("lm_head")  # a tied head is no tensor of the file, yet a Linear of the model
    rounded = inputs or {}
    members = {module: (spec, rounded.get(module)) for module, spec in specs.items()}
    groups: dict[str, Any] = {}
    for index, ((spec, activations), targets) in enumerate(_targets(members)):
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": weight_args(spec),
            "input_activations": None if activations is None else input_args(activations),
            "output_activations": None,
            "format": storage(spec, activations),
        }
    storages = list(dict.fromkeys(group["format"] for group in groups.values()))
    section = {
        "quant_method": NAME,
        "format": storages[0] if len(storages) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None if kv_cache is None else dict(kv_cache),
        "global_compression_ratio": None,
    }
    if _must_decode_at_once(list(specs.values()), len(groups)):
        section["dequantize"] = True
    return section


def _must_decode_at_once(specs: Sequence[QuantSpec], groups: int) -> bool:
    """Whether transformers has to be told to decode while it loads.

    transformers 5.23 with compressed-tensors 0.20 lays out zero points unpacked before it loads,
    and finds the file's too small, unless told to decode at once (5.17 with 0.19 loads them either
    way). And what the library decodes to bfloat16 stays that in a float32 model, which then cannot
    run; decoding at once casts it. That route knows one config group.
    """
    if not all(spec.symmetric for spec in specs):
        return True
    return groups == 1 and specs[0].name in DECODED_IN_BFLOAT16


def mixed_in_bfloat16(specs: Mapping[str, QuantSpec]) -> list[str]:
    """Modules that the library decodes to bfloat16 in a model of several number formats.

    Such a model loads in transformers in bfloat16 alone: decoding at once, which would cast them,
    knows one format.
    """
    if len(set(specs.values())) < 2:
        return []
    return [module for module, spec in specs.items() if spec.name in DECODED_IN_BFLOAT16]


def weight_args(spec: QuantSpec) -> dict[str, Any]:
    """A number format in the words of the library."""
    if spec.scale == "e4m3":
        strategy = "tensor_group"
    elif spec.group_rows is None:
        strategy = "tensor"
    elif spec.group_rows > 1:
        strategy = "block"
    else:
        strategy = "group" if spec.group_size else "channel"
    block = strategy == "block"
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": spec.type,
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": None if block else spec.group_size,
        "actorder": None,
        "dynamic": False,
    }
    if block:
        args["block_structure"] = [spec.group_rows, spec.group_size]
    if spec.scale in _SCALE_DTYPES:
        args["scale_dtype"] = args["zp_dtype"] = _SCALE_DTYPES[spec.scale]
    return args


def _targets(members: Mapping[str, Group]) -> list[tuple[Group, list[str]]]:
    """Distinct groups, in order of appearance, with what selects their modules."""
    distinct = list(dict.fromkeys(members.values()))
    if len(distinct) == 1:
        return [(distinct[0], ["Linear"])]
    owners: dict[str, set[Group]] = defaultdict(set)
    for module, group in members.items():
        owners[_pattern(module)].add(group)
    chosen: dict[Group, dict[str, None]] = {group: {} for group in distinct}
    for module, group in members.items():
        pattern = _pattern(module)
        chosen[group][pattern if len(owners[pattern]) == 1 else module] = None
    return [(group, list(targets)) for group, targets in chosen.items()]


def _pattern(module: str) -> str:
    """A pattern over all modules that end alike, up to the nearest name that is no number.

    ``model.layers.0.mlp.down_proj`` gives ``mlp.down_proj``, an expert's ``experts.3.down_proj``
    gives ``experts.<number>.down_proj``: experts and dense linears never share one.
    """
    tail: list[str] = []
    for part in reversed(module.split(".")):
        tail.insert(0, r"\d+" if part.isdigit() else re.escape(part))
        if len(tail) > 1 and not part.isdigit():
            break
    joined = r"\.".join(tail)
    return rf"re:(.*\.)?{joined}$"


def spec_of(weights: Mapping[str, Any], form: str | None) -> QuantSpec | None:
    """The inverse of `weight_args`.

    Args:
        weights: The ``weights`` of a config group.
        form: The name of its storage.

    Returns:
        The number format; None if it is none that is stored under that name here.
    """
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    scales = {"mxfp4-pack-quantized": "e8m0", "mxfp8-quantized": "e8m0"}
    scale = scales.get(form or "", "e4m3" if form == "nvfp4-pack-quantized" else "float")
    tiles = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "tensor_group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or ()),
    }
    if (kind == "int") != (form in ("pack-quantized", "int-quantized")) or strategy not in tiles:
        return None
    if (strategy == "tensor_group") != (scale == "e4m3") or weights.get("dynamic"):
        return None
    group_rows, group_size = tiles[strategy]
    data = {
        "bits": weights["num_bits"],
        "symmetric": weights.get("symmetric", True),
        "group_size": group_size,
        "type": kind,
        "group_rows": group_rows,
        "scale": scale,
    }
    try:
        return QuantSpec.parse(data, where="quantization_config")
    except ConfigError:
        return None
