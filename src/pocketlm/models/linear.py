"""One linear of a loaded block: nn.Linear, or GPT-2's Conv1D that stores its weight transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketlm.core.views import TensorSource

LINEAR_CLASSES = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix in a way that is known here."""
    # Subclasses may compute something else in their forward.
    return type(module) in LINEAR_CLASSES


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear."""
    if isinstance(module, Conv1D):
        return (module.nf, module.nx)
    assert isinstance(module, nn.Linear)
    return (module.out_features, module.in_features)


class Linear:
    """A LinearView (see core/views.py).

    Args:
        module: The loaded linear.
        tensor_name: Of its weight in the checkpoint.
        source: The checkpoint.
    """

    def __init__(self, module: nn.Module, tensor_name: str, source: TensorSource) -> None:
        self.module = module
        self.tensor_name = tensor_name
        self.name = tensor_name.removesuffix(".weight")
        self.out_features, self.in_features = linear_shape(module)
        self.stored_transposed = isinstance(module, Conv1D)
        self.dtype = source.infos()[tensor_name].dtype
        self._source = source
        self._replaced = False

    @property
    def _weight(self) -> Tensor:
        return self.module.weight.detach()  # type: ignore[operator]

    def weight_OI(self) -> Tensor:
        """A float32 copy of the weight, on the block's device.

        It comes from the checkpoint where the dtype that the block computes in cannot hold it.
        """
        weight = self._weight
        exact = weight.dtype in (torch.float32, self.dtype)
        if not exact and not self._replaced:
            weight = self._source.read(self.tensor_name).to(weight.device)
        if self.stored_transposed:
            weight = weight.T
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def set_weight_OI(self, weight_OI: Tensor) -> None:
        """Replaces the weight that the block's forward uses."""
        self._weight.copy_(weight_OI.T if self.stored_transposed else weight_OI)
        self._replaced = True
