"""A decoder block with its weights in memory: its linears, groups, and runs through it.

Legend: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pocketlm.core.views import Folded, Group, LinearView
from pocketlm.models.apply_fold import BlockFolds
from pocketlm.models.call import BlockCall, Call, first_tensor
from pocketlm.models.experts import PerExpert
from pocketlm.models.linear import Linear
from pocketlm.models.run import Run


class Block:
    """A BlockView (see core/views.py).

    Args:
        index: Position in the model.
        path: As the checkpoint spells it.
        module: The loaded block.
        linears: Its linears in order of execution.
        groups: Its groups in order of execution.
        skipped: What is left alone, and why.
        probe: Tries folds on the loaded block and gives the groups with them.
        folds: Carries them out.
        parameters: Checkpoint tensor → parameter of the block, where one is plainly the other.
    """

    def __init__(
        self,
        index: int,
        path: str,
        module: nn.Module,
        linears: Mapping[str, Linear],
        groups: tuple[Group, ...],
        skipped: Mapping[str, str],
        probe: Callable[[], tuple[Group, ...]],
        folds: BlockFolds,
        parameters: Mapping[str, str],
    ) -> None:
        self._probe, self._folds, self._parameters = probe, folds, parameters
        self.index, self.path, self.module = index, path, module
        self.linears: Mapping[str, LinearView] = linears
        self._linears = linears
        self.groups, self.skipped = groups, skipped

    def probe_folds(self) -> tuple[Group, ...]:
        """The groups with the best fold of each, tried in float64; seconds for a large block."""
        self.groups = self._probe()
        return self.groups

    def start(self, hidden_BTD: Tensor, call: Call) -> Run:
        """Begins a run on one batch.

        Args:
            hidden_BTD: The block's input; the run holds it only until the block's forward drops it.
            call: What ModelView.begin gave for the batch.

        Returns:
            The run, before its first group.
        """
        return Run(_forward, self.module, call.blocks[self.index], hidden_BTD)

    def forward(self, hidden_BTD: Tensor, call: Call) -> Tensor:
        """The block's output [B, T, D] without stops."""
        with torch.no_grad():
            return _forward(self.module, call.blocks[self.index], hidden_BTD)

    def forward_with(self, weights: Mapping[str, Tensor], hidden_BTD: Tensor, call: Call) -> Tensor:
        """The block's output with other weights [O, I], by module path; differentiable in them."""
        parameters = {}
        for name, weight_OI in weights.items():
            view = self._linears[name]
            weight = weight_OI.T if view.stored_transposed else weight_OI
            parameters[self._parameters[view.tensor_name]] = weight.to(
                view.module.get_parameter("weight").dtype
            )
        runner = _Whole(self.module, call.blocks[self.index])
        named = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(runner, named, (hidden_BTD,))

    def watch_experts(self, take: Callable[[str, int, Tensor, Tensor], None] | None) -> None:
        """Tells from now on what each expert is given; see core/views.py."""
        for inner, module in self.module.named_modules():
            if isinstance(module, PerExpert):
                path = f"{self.path}.{inner}"
                module.watch = None if take is None else partial(take, path)

    def fold(self, group: Group, scale_I: Tensor, dtype: torch.dtype | None) -> Folded:
        """Divides what a group's producer gives and multiplies the columns of its readers."""
        return self._folds.fold(group, scale_I, dtype)

    def tensor(self, name: str) -> Tensor:
        """A parameter of the block, by its name in the checkpoint."""
        return self.module.get_parameter(self._parameters[name]).data

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replaces a parameter of the block, by its name in the checkpoint."""
        self.module.get_parameter(self._parameters[name]).data.copy_(value)


class _Whole(nn.Module):
    """A block with its arguments as one module, for functional_call."""

    def __init__(self, module: nn.Module, call: BlockCall) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return _forward(self.module, self._call, hidden_BTD)


def _forward(module: nn.Module, call: BlockCall, hidden_BTD: Tensor) -> Tensor:
    return first_tensor(call.run(module, hidden_BTD))
