"""Sources that hold weights compressed and can hand them out as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.spec import ActivationSpec
from pocketlm.core.stored import WeightSpec
from pocketlm.core.tensors import WeightTensor
from pocketlm.core.views import TensorSource


@dataclass(frozen=True)
class PackedForm:
    """How a source holds one weight.

    Attributes:
        format: The file's format, such as ``gptq``.
        spec: In what form the weight is.
        shape: (O, I).
        bytes_stored: Everything counted.
        scale_dtype: Of the scales, where they are plain floats of one dtype; else float16.
        transposed: Whether the model's own weight is [I, O].
        activations: How the linear's inputs are rounded; None: not at all.
    """

    format: str
    spec: WeightSpec
    shape: tuple[int, int]
    bytes_stored: int
    scale_dtype: torch.dtype = torch.float16
    transposed: bool = False
    activations: ActivationSpec | None = None


class PackedSource(TensorSource, Protocol):
    """A TensorSource that also gives compressed weights without decoding them."""

    def forms(self) -> Mapping[str, PackedForm]:
        """Tensor name → how it is held, of every compressed weight; reads nothing large."""
        ...

    def packed(self, name: str) -> WeightTensor:
        """A compressed weight [O, I] as it is held, by its tensor name.

        Raises:
            PocketLMError: If its stored tensors contradict each other.
        """
        ...

    def quantizers(self) -> Mapping[str, InputQuantizer]:
        """Module path → what its inputs are rounded with; empty where nothing rounds them."""
        ...
