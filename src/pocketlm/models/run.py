"""One batch on its way through a block, stopped before each group of linears.

A greenlet runs the block's own forward; a pre-hook on the linears switches back to the caller. The
linear is computed after the switch, so a weight set during the pause is the one that is used, and
results are those of a plain forward. A run belongs to the thread that started it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from pocketlm.core.views import Pause
from pocketlm.models.linear import Linear


class _Runner(greenlet):
    """A greenlet that knows which groups it has already announced."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__(run)
        self.announced: set[int] = set()

    def is_first(self, group: int) -> bool:
        """Whether the run has not stood before this group yet; from now on it has."""
        if group in self.announced:
            return False
        self.announced.add(group)
        return True


def _is_first(group: int) -> bool:
    """Whether this code runs in a run that has not announced the group yet."""
    runner = getcurrent()
    return isinstance(runner, _Runner) and runner.is_first(group)


def pause_before(linears: Mapping[nn.Module, int]) -> list[torch.utils.hooks.RemovableHandle]:
    """Makes runs stop before groups of linears.

    Args:
        linears: Each linear and the index of its group.

    Returns:
        Handles that undo it.
    """
    return [linear.register_forward_pre_hook(_hook(group)) for linear, group in linears.items()]


def round_inputs(linears: Iterable[Linear]) -> list[torch.utils.hooks.RemovableHandle]:
    """Makes linears round their inputs with the quantizer that their view has at that moment.

    To be called after `pause_before`: a run stands before its group with the inputs as they came.

    Returns:
        Handles that undo it.
    """
    return [view.module.register_forward_pre_hook(_rounding(view)) for view in linears]


def _rounding(view: Linear) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if view.input_quantizer is None:
            return None
        return (view.input_quantizer(args[0]), *args[1:])

    return hook


def _hook(group: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        # No local may hold the runner across the switch: its own frame would keep it alive.
        if _is_first(group):
            parent = getcurrent().parent
            assert parent is not None
            parent.switch(Pause(group, args[0]))

    return hook


class Run:
    """A BlockRun (see core/views.py).

    Args:
        forward: Gives the block's output.
        arguments: What it is called with.
    """

    def __init__(self, forward: Callable[..., Tensor], *arguments: Any) -> None:
        self._runner: _Runner | None = _Runner(forward)
        self._arguments = arguments
        self._output: Tensor | None = None

    def advance(self) -> Pause | None:
        """Runs on to the next group; None once the block has finished."""
        if self._runner is None:
            return None
        self._runner.parent = getcurrent()
        with torch.no_grad():  # the mode belongs to the thread, not to the greenlet
            arguments, self._arguments = self._arguments, ()
            reached = self._runner.switch(*arguments)
        if isinstance(reached, Pause):
            return reached
        self._runner, self._output = None, reached
        return None

    @property
    def output(self) -> Tensor:
        """The block's output [B, T, D].

        Raises:
            RuntimeError: If the block has not finished.
        """
        if self._output is None:
            raise RuntimeError("advance() has not returned None yet")
        return self._output
