"""Carries out a fold in a loaded block: the producer is divided, its readers' columns multiplied.

A norm is stored in the checkpoint's dtype, so that dividing it rounds. The readers are multiplied
by what the norm was really divided by, as stored: the block's function stays to float32 rounding.
A linear that produces is divided in float32, before it is compressed; only its bias is rounded.
Legend: I input columns, O output rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketlm.core.views import Fold, Folded, Group, TensorSource
from pocketlm.models.folds import gather, spread
from pocketlm.models.linear import Linear
from pocketlm.models.names import NameMap


class BlockFolds:
    """Folds scales in one loaded block.

    Args:
        module: The block with its weights.
        path: Its path in the model.
        linears: Its linears by module path as the checkpoint spells it.
        producers: Module path as the checkpoint spells it → path relative to the block.
        names: The checkpoint's names.
        source: The checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        linears: dict[str, Linear],
        producers: dict[str, str],
        names: NameMap,
        source: TensorSource,
    ) -> None:
        self._module, self._path, self._linears = module, path, linears
        self._producers, self._names, self._source = producers, names, source
        self._values: dict[str, Tensor] = {}  # by tensor name: folded, as stored

    def fold(self, group: Group, scale_I: Tensor, dtype: torch.dtype | None) -> Folded:
        """Does what core/views.BlockView.fold says."""
        fold = group.fold
        assert fold is not None
        assert fold.accepted
        inner = self._producers[fold.producer]
        scale_O = gather(scale_I.float(), fold.shared, fold.width)
        tensors: dict[str, Tensor] = {}
        if fold.form == "linear":
            self._linears[fold.producer].scale(rows_O=scale_O)
        else:
            scale_O = self._divide_norm(f"{inner}.weight", scale_O, fold, dtype, tensors)
        bias = f"{self._path}.{inner}.bias"
        if bias in self._names.bindings:
            self._divide(f"{inner}.bias", scale_O, 0.0, dtype, tensors)
        scale_I = spread(scale_O, fold.shared, fold.width)
        for name in group.linears:
            self._linears[name].scale(columns_I=scale_I)
        return Folded(scale_I, tensors)

    def _divide_norm(
        self,
        parameter: str,
        scale_O: Tensor,
        fold: Fold,
        dtype: torch.dtype | None,
        tensors: dict[str, Tensor],
    ) -> Tensor:
        """Divides a norm's weight; gives what it was divided by as stored."""
        plus = 1.0 if fold.form == "one_plus_weight" else 0.0
        before_O, after_O = self._divide(parameter, scale_O, plus, dtype, tensors)
        actual_O = (before_O + plus) / (after_O + plus)
        return torch.where(torch.isfinite(actual_O) & (actual_O > 0), actual_O, scale_O)

    def _divide(
        self,
        parameter: str,
        scale_O: Tensor,
        plus: float,
        dtype: torch.dtype | None,
        tensors: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(w + plus) / s - plus, rounded to how it is stored; before and after, float32."""
        name = self._names.bindings[f"{self._path}.{parameter}"].tensors[0]
        stored = self._values.get(name)
        if stored is None:
            stored = self._source.read(name)
        before_O = stored.to(scale_O.device, torch.float32)
        after = ((before_O + plus) / scale_O - plus).to(dtype or stored.dtype)
        self._values[name] = tensors[name] = after.cpu()
        self._module.get_parameter(parameter).data.copy_(after)
        return before_O, after.float()
