"""The format ``dense``: an ordinary checkpoint, nothing in config.json; loads everywhere.

What a recipe leaves that prunes and does not quantize: zeros are stored like any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import ActivationSpec
from pocketlm.core.stored import DenseSpec
from pocketlm.core.tensors import Dense, WeightTensor
from pocketlm.formats.compressed_tensors import module_of
from pocketlm.formats.layouts import dense

NAME = "dense"


def names(
    tensor_name: str, spec: DenseSpec, activations: ActivationSpec | None = None
) -> tuple[str, ...]:
    """The weight's own name."""
    return (tensor_name,)


def encode(
    tensor_name: str, weight: WeightTensor, quantizer: InputQuantizer | None = None
) -> dict[str, Tensor]:
    """The stored tensor of a weight, by name.

    Raises:
        ArtifactError: If a value is not finite.
    """
    module = module_of(tensor_name)
    if not weight.is_finite:
        raise ArtifactError("a weight is not finite.", where=module)
    return dense.encode(module, weight)


def decode(tensors: Mapping[str, Tensor], base: str, spec: DenseSpec) -> Dense:
    """The weight from its stored tensor.

    Raises:
        ArtifactError: If it is missing.
    """
    return dense.decode(tensors, base.removesuffix(".weight"), spec)


def stored_bytes(
    spec: DenseSpec,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    activations: ActivationSpec | None = None,
) -> int:
    """Bytes on disk of one weight."""
    return spec.stored_bits(shape) // 8


def config_section(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Nothing: the artifact has no ``quantization_config``."""
    return {}
