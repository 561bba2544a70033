"""One linear of a loaded block: nn.Linear, or GPT-2's Conv1D that stores its weight transposed."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.views import TensorSource

PROBE_I, PROBE_O, PROBE_TOLERANCE = 12, 10, 1e-12  # narrow, and exact but for float64's rounding


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b, or x W + b as Conv1D does; subclasses are tried out."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return type(module) in (nn.Linear, Conv1D) or _computes_linear(type(module), module)


_VERDICTS: dict[type, bool] = {}


def _computes_linear(kind: type, module: nn.Module) -> bool:
    """Runs a narrow copy in float64 against the formula, once for each class."""
    if kind not in _VERDICTS:
        generator = torch.Generator().manual_seed(0)
        weight_OI = torch.randn(PROBE_O, PROBE_I, generator=generator, dtype=torch.float64)
        bias_O, x_TI = weight_OI[:, 0].clone(), weight_OI[:5] + 1
        narrow = copy.copy(module)
        stored = weight_OI.T if isinstance(module, Conv1D) else weight_OI
        narrow._parameters = {"weight": nn.Parameter(stored), "bias": nn.Parameter(bias_O)}
        for name, value in (("in_features", PROBE_I), ("out_features", PROBE_O), ("nf", PROBE_O)):
            if name in vars(narrow):
                setattr(narrow, name, value)
        try:
            with torch.no_grad():
                error = (narrow(x_TI) - F.linear(x_TI, weight_OI, bias_O)).abs().max()
            _VERDICTS[kind] = bool(error < PROBE_TOLERANCE)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            _VERDICTS[kind] = False
    return _VERDICTS[kind]


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
        self.input_quantizer: InputQuantizer | None = None
        self._replaced = False
        self._original: Tensor | None = None  # on a GPU, once folds have taken the weight's place
        self._columns_I: Tensor | None = None  # folds: the columns are multiplied,
        self._rows_O: Tensor | None = None  # the rows divided

    @property
    def _weight(self) -> Tensor:
        return self.module.weight.detach()  # type: ignore[operator]

    def weight_OI(self) -> Tensor:
        """A float32 copy of the original weight, after folds, on the block's device.

        It comes from the checkpoint where the block no longer holds it, or not exactly.
        """
        weight = self._weight
        if self._original is not None:
            weight = self._original
        elif self._replaced or weight.dtype not in (torch.float32, self.dtype):
            weight = self._source.read(self.tensor_name).to(weight.device)
        if self.stored_transposed:
            weight = weight.T
        weight = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self._columns_I is not None:
            weight *= self._columns_I
        if self._rows_O is not None:
            weight /= self._rows_O[:, None]
        return weight

    def set_weight_OI(self, weight_OI: Tensor) -> None:
        """Replaces the weight that the block's forward uses."""
        self._weight.copy_(weight_OI.T if self.stored_transposed else weight_OI)
        self._replaced = True

    def set_input_quantizer(self, quantizer: InputQuantizer | None) -> None:
        """What the block's forward rounds this linear's inputs with from now on; None: nothing."""
        self.input_quantizer = None if quantizer is None else quantizer.to(self._weight.device)

    def scale(self, columns_I: Tensor | None = None, rows_O: Tensor | None = None) -> None:
        """Folds scales into the original: columns are multiplied, rows divided; once or again."""
        if self._weight.is_cuda and self._weight.dtype == self.dtype and not self._replaced:
            self._original = self._weight.clone()  # it is asked for twice; reading takes longer
        if columns_I is not None:
            self._columns_I = columns_I if self._columns_I is None else self._columns_I * columns_I
        if rows_O is not None:
            self._rows_O = rows_O if self._rows_O is None else self._rows_O * rows_O
        self._replaced = True  # what the block holds is the scaled weight, rounded
        self.set_weight_OI(self.weight_OI())
