"""A format of integers alone, as GPTQ, AWQ and MLX have it: a layout, its limits, its words.

Each is an `IntegerFormat` in a file of its own. They hold weights only: no rounding of inputs, and
no embedding or head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import WeightSpec
from pocketlm.core.tensors import WeightTensor
from pocketlm.formats.capabilities import check_layer
from pocketlm.formats.compressed_tensors import module_of
from pocketlm.formats.layouts import Layout, Parts
from pocketlm.formats.safetensors_header import element_bytes

Shape = tuple[int, int]


@dataclass(frozen=True)
class IntegerFormat:
    """One format.

    Attributes:
        NAME: As ``--to`` spells it.
        layout: How a weight lies in the file.
        refuses: Why a grid of a weight (O, I) cannot be held; None where it can.
        section: The part of config.json, from the grids by module and the linears that are kept.
    """

    NAME: str
    layout: Layout
    refuses: Callable[[QuantSpec, Shape], str | None]
    section: Callable[[Mapping[str, QuantSpec], Sequence[str], Sequence[str]], dict[str, Any]]

    def names(
        self, tensor_name: str, spec: QuantSpec, activations: ActivationSpec | None = None
    ) -> tuple[str, ...]:
        """The tensors that take the place of a weight, in the order in which they are written."""
        module = module_of(tensor_name)
        return tuple(f"{module}.{role}" for role in self.layout.roles(spec))

    def parts(
        self,
        spec: QuantSpec,
        shape: Shape,
        scale_dtype: torch.dtype,
        activations: ActivationSpec | None = None,
    ) -> Parts:
        """Role, shape and dtype of the tensors that take the place of a weight (O, I)."""
        return self.layout.parts(spec, shape, scale_dtype)

    def encode(
        self, tensor_name: str, weight: WeightTensor, quantizer: InputQuantizer | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors of a weight, by name.

        Args:
            tensor_name: The weight's name in the source, ``….weight``.
            weight: Integer codes of [O, I].
            quantizer: Must be None: inputs are not rounded.

        Raises:
            ArtifactError: If a code, zero point or scale does not fit.
            UnsupportedLayer: If it is no weight that the format holds.
        """
        module = module_of(tensor_name)
        if quantizer is not None:
            raise UnsupportedLayer(f"{self.NAME} rounds no inputs.", where=module)
        self.check(weight.spec, weight.shape, where=module)
        if not weight.is_finite:
            raise ArtifactError("a scale is not finite.", where=module)
        return self.layout.encode(module, weight)

    def decode(self, tensors: Mapping[str, Tensor], base: str, spec: QuantSpec) -> WeightTensor:
        """A weight, from its stored tensors.

        Raises:
            ArtifactError: If a tensor is missing or the shapes contradict each other.
        """
        return self.layout.decode(tensors, base.removesuffix(".weight"), spec)

    def stored_bytes(
        self,
        spec: QuantSpec,
        shape: Shape,
        scale_dtype: torch.dtype,
        activations: ActivationSpec | None = None,
    ) -> int:
        """Bytes on disk of one weight, everything counted."""
        parts = self.parts(spec, shape, scale_dtype).values()
        return sum(math.prod(sides) * element_bytes(dtype) for sides, dtype in parts)

    def check(
        self, spec: WeightSpec, shape: Shape, target: str | None = None, where: str | None = None
    ) -> None:
        """Refuses a weight that this format cannot hold or `target` cannot run.

        Args:
            spec: In what form the weight is.
            shape: (O, I).
            target: Name of the engine; None: the format's own limits only.
            where: Module path for the message.

        Raises:
            UnsupportedLayer: With what to choose instead.
            ConfigError: If the target is unknown.
        """
        if not isinstance(spec, QuantSpec) or spec.type != "int":
            raise UnsupportedLayer(
                f"{self.NAME} holds integers only, not {spec.name}.",
                where=where,
                remedy="compressed-tensors holds floats too; dense holds everything.",
            )
        why = self.refuses(spec, shape)
        if why is not None:
            raise UnsupportedLayer(
                f"{self.NAME} {why}.", where=where, remedy="compressed-tensors can hold it."
            )
        if target is not None:
            check_layer(self.NAME, spec, shape, target, where)

    def config_section(
        self,
        specs: Mapping[str, QuantSpec],
        ignored: Sequence[str],
        inputs: Mapping[str, ActivationSpec] | None = None,
        permuted: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What config.json says of it.

        Args:
            specs: Module path → grid, of every compressed linear.
            ignored: Module paths of what is kept.
            inputs: Must be empty: inputs are not rounded.
            permuted: Those of `specs` whose groups' columns lie scattered.

        Returns:
            Plain JSON, deterministic.

        Raises:
            ConfigError: If nothing is compressed, or the grids cannot stand in one file.
        """
        if not specs:
            raise ConfigError("no linear is compressed; there is nothing to configure.")
        if inputs:
            raise ConfigError(f"{self.NAME} rounds no inputs.", where=next(iter(inputs)))
        return self.section(specs, ignored, permuted)
