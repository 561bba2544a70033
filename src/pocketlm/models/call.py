"""What each block is called with besides its input: masks, rotary tables, positions.

Pass-through recorders stand in place of all blocks at once while the model's own forward runs, so
that each layer's own arguments are kept (Gemma's differ by layer type).
Legend: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketlm.core.errors import UnsupportedModel

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block's forward.

    Attributes:
        args: Positional ones after the hidden states.
        kwargs: Named ones.
        by_name: Whether the hidden states are passed by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_name: bool

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Any:
        """Calls a block as the model would have."""
        if self.by_name:
            return block(*self.args, **{HIDDEN: hidden_BTD}, **self.kwargs)
        return block(hidden_BTD, *self.args, **self.kwargs)


@dataclass(frozen=True)
class Call:
    """The arguments of every block for one batch."""

    blocks: tuple[BlockCall, ...]


def first_tensor(output: Any) -> Tensor:
    """A block's new hidden states: its output, or the first of them."""
    return output[0] if isinstance(output, tuple | list) else output


class TensorShare:
    """Gives equal tensors back as one, so that calls of many batches stay small."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[weakref.ref[Tensor]]] = {}

    def share(self, value: Any) -> Any:
        """The value with every tensor in it replaced by an equal one that is known already."""
        if isinstance(value, Tensor):
            return self._share_tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        if type(value) is dict:
            return {key: self.share(item) for key, item in value.items()}
        return value

    def _share_tensor(self, tensor: Tensor) -> Tensor:
        key = (tuple(tensor.shape), tensor.dtype, tensor.device)
        known = [ref for ref in self._known.get(key, []) if ref() is not None]
        for ref in known:
            other = ref()
            if other is not None and torch.equal(other, tensor):
                return other
        self._known[key] = [*known, weakref.ref(tensor)]
        return tensor


@contextmanager
def stand_in(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Replaces the forward of some modules; their attributes stay readable, hooks stay in place."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own forward shows again


def hand_on(wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Stands in for one block: hands the hidden states on, and looks at nothing.

    Args:
        wrap: Turns hidden states into what the block's class returns.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return wrap(kwargs[HIDDEN] if HIDDEN in kwargs else args[0])

    return run


class Recorder:
    """Stands in for one block: keeps what it is called with, hands the hidden states on.

    Args:
        wrap: Turns hidden states into what the block's class returns.
        share: Where equal tensors become one.
    """

    def __init__(self, wrap: Callable[[Tensor], Any], share: TensorShare) -> None:
        self._wrap, self._share = wrap, share
        self.hidden: Tensor | None = None
        self._call: BlockCall | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the arguments; gives the hidden states back."""
        by_name = HIDDEN in kwargs
        hidden = kwargs.pop(HIDDEN) if by_name else args[0]
        rest = args if by_name else args[1:]
        self.hidden = hidden
        self._call = BlockCall(self._share.share(tuple(rest)), self._share.share(kwargs), by_name)
        return self._wrap(hidden)

    def call(self, where: str) -> BlockCall:
        """What was recorded.

        Raises:
            UnsupportedModel: If the model's forward never called the block.
        """
        if self._call is None:
            raise UnsupportedModel("the model's forward does not run this block.", where=where)
        return self._call
