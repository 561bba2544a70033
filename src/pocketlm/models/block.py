"""A decoder block with its weights in memory: its linears, groups, and runs through it.

Legend: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pocketlm.core.views import Group, LinearView
from pocketlm.models.call import BlockCall, Call, first_tensor
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
    ) -> None:
        self._probe = probe
        self.index, self.path, self.module = index, path, module
        self.linears: Mapping[str, LinearView] = linears
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


def _forward(module: nn.Module, call: BlockCall, hidden_BTD: Tensor) -> Tensor:
    return first_tensor(call.run(module, hidden_BTD))
