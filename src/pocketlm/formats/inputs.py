"""The rounding of a linear's inputs on disk, the same in every format.

Dynamic roundings are words in config.json alone. Static ones also store, for a linear ``x``,

- ``x.input_scale``       float32 [1];
- ``x.input_zero_point``  int8 [1], asymmetric only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, ConfigError
from pocketlm.core.spec import ActivationSpec
from pocketlm.formats.layouts import Parts

SCALE, ZERO = "input_scale", "input_zero_point"
ROLES = (SCALE, ZERO)


def roles(spec: ActivationSpec | None) -> tuple[str, ...]:
    """The tensors that a rounding stores, in the order in which they are written."""
    if spec is None or spec.dynamic:
        return ()
    return (SCALE,) if spec.symmetric else (SCALE, ZERO)


def parts(spec: ActivationSpec | None) -> Parts:
    """The same with shapes and dtypes."""
    known: Parts = {SCALE: ((1,), torch.float32), ZERO: ((1,), torch.int8)}
    return {role: known[role] for role in roles(spec)}


def encode(module: str, quantizer: InputQuantizer | None) -> dict[str, Tensor]:
    """The stored tensors of a rounding, by their whole names."""
    if quantizer is None:
        return {}
    return {f"{module}.{role}": tensor for role, tensor in quantizer.tensors().items()}


def decode(
    tensors: Mapping[str, Tensor], module: str, spec: ActivationSpec | None
) -> InputQuantizer | None:
    """The rounding of a linear's inputs, from what is stored.

    Args:
        tensors: By name, at least those of this module; others are not looked at.
        module: Module path.
        spec: What kind; None: inputs are not rounded.

    Raises:
        ArtifactError: If a tensor is missing, no single number, or no usable scale.
    """
    if spec is None:
        return None
    if spec.dynamic:
        return InputQuantizer(spec)
    scale = _single(tensors, module, SCALE).float()
    if not bool(torch.isfinite(scale) & (scale > 0)):
        raise ArtifactError(f"{SCALE} is {float(scale)}.", where=module)
    zero = None if spec.symmetric else _single(tensors, module, ZERO).to(torch.int8)
    return InputQuantizer(spec, scale, zero)


def _single(tensors: Mapping[str, Tensor], module: str, role: str) -> Tensor:
    tensor = tensors.get(f"{module}.{role}")
    if tensor is None:
        raise ArtifactError(f"the tensor '{module}.{role}' is missing.", where=module)
    if tensor.numel() != 1:
        raise ArtifactError(f"{role} is {tuple(tensor.shape)}, not one number.", where=module)
    return tensor.reshape(1)


def input_args(spec: ActivationSpec) -> dict[str, Any]:
    """A rounding in the words of compressed-tensors: the ``input_activations`` of a group."""
    return {
        "num_bits": spec.bits,
        "type": spec.type,
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def spec_of(args: Mapping[str, Any]) -> ActivationSpec | None:
    """The inverse of `input_args`.

    Args:
        args: The ``input_activations`` of a config group, as any tool writes them.

    Returns:
        The rounding; None if it is none that is done here.
    """
    known = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
    ignored = ("observer", "observer_kwargs", "actorder", "block_structure", "zp_dtype")
    surplus = {key for key, value in args.items() if key not in (*known, *ignored) and value}
    if surplus or args.get("actorder") or args.get("block_structure"):
        return None
    group_size = args.get("group_size")
    data = {
        "bits": args.get("num_bits", 8),
        "type": args.get("type", "int"),
        "symmetric": args.get("symmetric", True),
        "granularity": args.get("strategy") or "tensor",
        "group_size": group_size if args.get("strategy") == "group" else None,
        "dynamic": args.get("dynamic", False),
    }
    try:
        return ActivationSpec.parse(data, where="input_activations")
    except ConfigError:
        return None
