"""How one compressed weight lies in a file, one module a layout; formats choose among them.

A weight ``x.weight`` becomes the tensors ``x.<role>``. A layout is a module with the functions of
`Layout`; a role is a name such as ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError

Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Role → shape and dtype of the stored tensor, in the order in which they are written."""

ROLES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "weight_scale_absmax",
    "weight_scale_offset",
    "weight_super_scale",
    "weight_minimum",
    "weight_super_minimum",
    "weight_mask",
    "weight_values",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "biases",
)
SCALES = ("weight_scale", "scales")
"""The roles of a weight's scales."""

FACTORS = ("left", "right")
"""The factors of a weight, as parts of its name: ``x.left.<role>``."""


class Layout(Protocol):
    """What every module of this package offers, for the kinds of `WeightSpec` that it stores."""

    def roles(self, spec: Any) -> tuple[str, ...]:
        """The tensors of a weight, in the order in which they are written."""
        ...

    def parts(self, spec: Any, shape: tuple[int, int], scale_dtype: torch.dtype) -> Parts:
        """The same with shapes and dtypes, for a weight (O, I)."""
        ...

    def encode(self, module: str, weight: Any, /) -> dict[str, Tensor]:
        """The stored tensors of a weight by their whole names."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], module: str, spec: Any) -> Any:
        """The weight from its stored tensors; `ArtifactError` where they contradict the spec."""
        ...

    def shape(
        self,
        module: str,
        spec: Any,
        shapes: Callable[[str], tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> tuple[int, int]:
        """(O, I), from the shapes of the stored tensors or, where they do not tell, their values.

        Args:
            module: Module path.
            spec: The number format.
            shapes: Gives the shape of a stored tensor by name.
            read: Gives a stored tensor by name.
        """
        ...


def take(tensors: Mapping[str, Tensor], module: str, role: str) -> Tensor:
    """A stored tensor of a module.

    Raises:
        ArtifactError: If it is missing.
    """
    name = f"{module}.{role}"
    if name not in tensors:
        raise ArtifactError(f"the tensor '{name}' is missing.", where=module)
    return tensors[name]


def take_as(
    tensors: Mapping[str, Tensor], module: str, role: str, shape: tuple[int, ...], dtype: str
) -> Tensor:
    """A stored tensor of a known shape and dtype; "float" is any of more than 8 bits.

    Raises:
        ArtifactError: If it is missing or another.
    """
    tensor = take(tensors, module, role)
    found = str(tensor.dtype).removeprefix("torch.")
    right = (
        tensor.is_floating_point() and tensor.element_size() > 1
        if dtype == "float"
        else (found == dtype)
    )
    if tuple(tensor.shape) != shape or not right:
        wanted = f"{dtype} {shape}"
        raise ArtifactError(
            f"{role} is {found} {tuple(tensor.shape)}, config.json says {wanted}.", where=module
        )
    return tensor
