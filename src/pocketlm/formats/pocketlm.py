"""The format ``pocketlm``: what no engine's own format can hold, loaded through `pocketlm.hf`.

That is GPT-2's Conv1D, whose weight lies transposed ([I, O]) in the checkpoint, the tables of
bitsandbytes (NF4, FP4), sparse weights of which only what is kept is stored, and weights in two
thin factors. Codes are stored as [O, I], so that groups run along the inputs as everywhere; the
section of config.json lists a transposed module under ``transposed``. Integers lie as in
``pack-quantized`` of compressed-tensors, other codes as bytes (`layouts.float_packed`), sparse
weights as in `layouts.sparse`, factors as in `layouts.low_rank` and `layouts.summed`. Matrices that
pass the stream from one block's basis to the next (models/shortcut.py) are ordinary tensors; the
section names their modules under ``shortcuts``, and the last linear of the block of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, ConfigError
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import DenseSpec, LowRankSpec, SparseSpec, SumSpec, WeightSpec
from pocketlm.core.tensors import WeightTensor
from pocketlm.formats import inputs as stored_inputs
from pocketlm.formats.capabilities import check_layer
from pocketlm.formats.compressed_tensors import check_shape, module_of, parts_bytes
from pocketlm.formats.layouts import (
    Layout,
    Parts,
    dense,
    float_packed,
    low_rank,
    pack_quantized,
    sparse,
    summed,
)

NAME = "pocketlm"
FORMAT_VERSION = 1
GUARD = {"transformers_weights": "`import pocketlm.hf` before loading this model"}
"""A key of config.json beside the section. Of an unknown ``quant_method`` transformers only warns,
and makes the weights up; a file of weights that is none it refuses, with the words above. Our
quantizer takes the key away before it is read."""


def layout_of(spec: WeightSpec) -> Layout:
    """How a weight is stored."""
    if isinstance(spec, DenseSpec):
        return dense
    if isinstance(spec, SparseSpec):
        return sparse
    if isinstance(spec, LowRankSpec):
        return low_rank
    if isinstance(spec, SumSpec):
        return summed
    return pack_quantized if spec.type == "int" else float_packed


def parts(spec: WeightSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
    """Role, shape and dtype of the tensors that take the place of a weight (O, I)."""
    return layout_of(spec).parts(spec, shape, scale_dtype)


def names(
    tensor_name: str, spec: WeightSpec, activations: ActivationSpec | None = None
) -> tuple[str, ...]:
    """The tensors that take the place of a weight, in the order in which they are written.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        spec: In what form it is.
        activations: How the linear's inputs are rounded; None: not at all.
    """
    module = module_of(tensor_name)
    roles = (*layout_of(spec).roles(spec), *stored_inputs.roles(activations))
    return tuple(f"{module}.{role}" for role in roles)


def encode(
    tensor_name: str, weight: WeightTensor, quantizer: InputQuantizer | None = None
) -> dict[str, Tensor]:
    """The stored tensors of a weight, by name.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        weight: The weight [O, I], in any form.
        quantizer: What the linear's inputs are rounded with; None: nothing.

    Raises:
        ArtifactError: If a code or zero point does not fit, or a scale is not finite.
    """
    module = module_of(tensor_name)
    if not weight.is_finite:
        raise ArtifactError("a scale is not finite.", where=module)
    stored = layout_of(weight.spec).encode(module, weight)
    return {**stored, **stored_inputs.encode(module, quantizer)}


def decode(tensors: Mapping[str, Tensor], base: str, spec: WeightSpec) -> WeightTensor:
    """A weight, from its stored tensors.

    Args:
        tensors: By name, at least those of this weight; others are not looked at.
        base: Module path, or the weight's name in the source.
        spec: In what form it is.

    Raises:
        ArtifactError: If a tensor is missing or the shapes contradict each other.
    """
    return layout_of(spec).decode(tensors, base.removesuffix(".weight"), spec)


def stored_bytes(
    spec: WeightSpec,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    activations: ActivationSpec | None = None,
) -> int:
    """Bytes on disk of one weight, everything counted.

    Args:
        spec: In what form it is.
        shape: (O, I).
        scale_dtype: The dtype in which plain scales are stored.
        activations: As in `names`.
    """
    stored = parts_bytes(layout_of(spec), spec, shape, scale_dtype)
    return stored + (0 if activations is None else activations.stored_bits // 8)


def check(
    spec: QuantSpec, shape: tuple[int, int], target: str = "transformers", where: str | None = None
) -> None:
    """Refuses a number format that `target` cannot load in this format.

    Args:
        spec: The number format.
        shape: (O, I) of the weight, in the orientation of a Linear.
        target: Name of the engine.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    check_shape(spec, shape, where)
    check_layer(NAME, spec, shape, target, where)


def config_section(
    specs: Mapping[str, WeightSpec],
    ignored: Sequence[str],
    transposed: Sequence[str] = (),
    inputs: Mapping[str, ActivationSpec] | None = None,
    shortcuts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: every module by name, grouped by format.

    Args:
        specs: Module path → form of the weight, of every compressed linear.
        ignored: Module paths of every linear that is kept.
        transposed: Those of `specs` whose weight is [I, O] in the model.
        inputs: Module path → how its inputs are rounded, of the linears whose are.
        shortcuts: Matrix between two blocks → the first's last linear, by module path.

    Returns:
        Plain JSON, deterministic.

    Raises:
        ConfigError: If nothing is compressed, or a transposed module has no format.
    """
    if not specs and not shortcuts:
        raise ConfigError("no linear is compressed; there is nothing to configure.")
    strangers = [module for module in transposed if module not in specs]
    if strangers:
        raise ConfigError("a module without a grid is called transposed.", where=strangers[0])
    rounded = inputs or {}
    groups: dict[tuple[WeightSpec, ActivationSpec | None], list[str]] = {}
    for module, spec in specs.items():
        groups.setdefault((spec, rounded.get(module)), []).append(module)
    return {
        "quant_method": NAME,
        "format_version": FORMAT_VERSION,
        "groups": [
            {
                "weights": spec.model_dump(mode="json"),
                **({} if activations is None else {"inputs": activations.model_dump()}),
                "modules": modules,
            }
            for (spec, activations), modules in groups.items()
        ],
        "transposed": list(transposed),
        "ignore": list(ignored),
        **({"shortcuts": dict(shortcuts)} if shortcuts else {}),
    }


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what tells of compression, and of files: what is written has its own."""
    return {k: v for k, v in config.items() if k != "quantization_config" and k not in GUARD}


def shortcuts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Matrix between two blocks → the first's last linear, out of config.json."""
    section = config.get("quantization_config") or {}
    return dict(section.get("shortcuts", {})) if section.get("quant_method") == NAME else {}


def only_shortcuts(config: Mapping[str, Any]) -> bool:
    """Whether all that the section of config.json tells of is matrices between blocks."""
    return bool(shortcuts_of(config)) and not config["quantization_config"]["groups"]
