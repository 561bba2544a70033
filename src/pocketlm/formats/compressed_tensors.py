"""compressed-tensors: what vLLM and transformers load by themselves.

Each number format has its storage, by the name that the library gives it:

integers                ``pack-quantized``; ``int-quantized`` for 8 bits beside 8-bit activations
FP8                     ``float-quantized`` (the library reads ``naive-quantized`` alike)
MXFP8                   ``mxfp8-quantized``
MXFP4, NVFP4            ``mxfp4-pack-quantized``, ``nvfp4-pack-quantized``
several of them         ``mixed-precision``, each group with its own

The tensors of each are in `formats.layouts`. Only linears and embeddings; GPT-2's transposed
Conv1D and the tables of bitsandbytes (NF4, FP4) go through `formats.pocketlm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import DenseSpec, WeightSpec
from pocketlm.core.tensors import WeightTensor
from pocketlm.formats import inputs
from pocketlm.formats.capabilities import check_layer
from pocketlm.formats.compressed_config import NAME, config_section, storage, weight_args
from pocketlm.formats.layouts import (
    Layout,
    Parts,
    dense,
    float_packed,
    pack_quantized,
    plain_quantized,
)
from pocketlm.formats.packing import fills_bytes
from pocketlm.formats.safetensors_header import element_bytes

__all__ = ["NAME", "config_section", "decode", "encode", "names", "storage", "weight_args"]

LAYOUTS: dict[str, Layout] = {
    "pack-quantized": pack_quantized,
    "int-quantized": plain_quantized,
    "float-quantized": plain_quantized,
    "naive-quantized": plain_quantized,
    "mxfp8-quantized": plain_quantized,
    "mxfp4-pack-quantized": float_packed,
    "nvfp4-pack-quantized": float_packed,
}


def module_of(tensor_name: str) -> str:
    """The module path of a weight's name.

    Raises:
        UnsupportedLayer: If the tensor is no module's ``weight``.
    """
    module, dot, leaf = tensor_name.rpartition(".")
    if not dot or leaf != "weight":
        raise UnsupportedLayer(
            "only a tensor named '….weight' can be stored as codes and scales.",
            where=tensor_name,
            remedy="Put it into ignore.",
        )
    return module


def names(
    tensor_name: str, spec: QuantSpec, activations: ActivationSpec | None = None
) -> tuple[str, ...]:
    """The tensors that take the place of a weight, in the order in which they are written.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        spec: Its number format.
        activations: How the linear's inputs are rounded; None: not at all.
    """
    module = module_of(tensor_name)
    roles = (*LAYOUTS[storage(spec, activations)].roles(spec), *inputs.roles(activations))
    return tuple(f"{module}.{role}" for role in roles)


def encode(
    tensor_name: str, weight: WeightTensor, quantizer: InputQuantizer | None = None
) -> dict[str, Tensor]:
    """The stored tensors of a weight, by name.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        weight: Codes and scales of [O, I]; or values as they are, which stay an ordinary tensor.
        quantizer: What the linear's inputs are rounded with; None: nothing.

    Returns:
        The tensors that `names` lists, contiguous, on the device of the codes.

    Raises:
        ArtifactError: If a code or zero point does not fit, or a scale is not finite.
    """
    module = module_of(tensor_name)
    if not weight.is_finite:
        raise ArtifactError("a scale is not finite.", where=module)
    spec = weight.spec
    if isinstance(spec, DenseSpec):
        return dense.encode(module, weight)
    if not isinstance(spec, QuantSpec):
        raise UnsupportedLayer(f"{NAME} cannot hold {spec.name}.", where=module)
    layout = LAYOUTS[storage(spec, None if quantizer is None else quantizer.spec)]
    return {**layout.encode(module, weight), **inputs.encode(module, quantizer)}


def decode(tensors: Mapping[str, Tensor], base: str, spec: WeightSpec) -> WeightTensor:
    """A weight, from its stored tensors.

    Args:
        tensors: By name, at least those of this weight; others are not looked at.
        base: Module path, or the weight's name in the source.
        spec: In what form it is.

    Raises:
        ArtifactError: If a tensor is missing or the shapes contradict each other.
    """
    module = base.removesuffix(".weight")
    if isinstance(spec, DenseSpec):
        return dense.decode(tensors, module, spec)
    if not isinstance(spec, QuantSpec):
        raise UnsupportedLayer(f"{NAME} cannot hold {spec.name}.", where=module)
    if spec.type == "int" and f"{module}.weight" in tensors:
        return plain_quantized.decode(tensors, module, spec)
    return LAYOUTS[storage(spec)].decode(tensors, module, spec)


def parts(
    spec: QuantSpec,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    activations: ActivationSpec | None = None,
) -> Parts:
    """Role, shape and dtype of the tensors that take the place of a weight (O, I)."""
    layout = LAYOUTS[storage(spec, activations)]
    return {**layout.parts(spec, shape, scale_dtype), **inputs.parts(activations)}


def stored_bytes(
    spec: QuantSpec,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    activations: ActivationSpec | None = None,
) -> int:
    """Bytes on disk of one weight, everything counted.

    Args:
        spec: Its number format.
        shape: (O, I).
        scale_dtype: The dtype in which plain scales are stored.
        activations: As in `names`.
    """
    stored = parts_bytes(LAYOUTS[storage(spec, activations)], spec, shape, scale_dtype)
    return stored + (0 if activations is None else activations.stored_bits // 8)


def parts_bytes(
    layout: Layout, spec: WeightSpec, shape: tuple[int, int], scale_dtype: torch.dtype
) -> int:
    """Bytes of all tensors that a layout makes of a weight."""
    parts = layout.parts(spec, shape, scale_dtype).values()
    return sum(math.prod(sides) * element_bytes(dtype) for sides, dtype in parts)


def check(
    spec: QuantSpec, shape: tuple[int, int], target: str = "transformers", where: str | None = None
) -> None:
    """Refuses a number format that this format cannot hold or `target` cannot run.

    Args:
        spec: The number format.
        shape: (O, I) of the weight.
        target: Name of the engine.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    storage(spec, where=where)
    check_shape(spec, shape, where)
    check_layer(NAME, spec, shape, target, where)


def check_shape(spec: QuantSpec, shape: tuple[int, int], where: str | None = None) -> None:
    """Refuses a weight that is too narrow to be stored.

    Args:
        spec: The number format.
        shape: (O, I) of the weight.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: With what to do instead.
    """
    if shape[1] < 32 or (spec.type != "int" and not fills_bytes(shape[1], spec.bits)):
        why = "is too narrow; 32 are needed" if shape[1] < 32 else "does not fill whole bytes"
        raise UnsupportedLayer(
            f"a weight of {shape[1]} columns {why}.",
            where=where,
            remedy="Put the layer into ignore.",
        )
