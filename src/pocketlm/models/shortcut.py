"""Matrices on the residual of blocks that write the stream in the next block's basis (SliceGPT,
arXiv:2401.15024, section 3.3).

A block computes x + f(x). Its last linear writes in the next basis already, what is left is in that
of the block, and passes from one to the other by a matrix:

    y' = (y - w) (Qᵀ Q') + w,    y the block's output, w what its last linear gave

with Q the block's basis and Q' the next one, both [D, K]. The matrix is a linear of the block that
transformers loads like any other; hooks on the block and on its last linear do the rest. A block
belongs to one thread while it runs.

Legend: D hidden width of the original, K columns kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocketlm.core.errors import UnsupportedModel
from pocketlm.models.call import first_tensor

SHORTCUT = "shortcut"  # the linear's name in its block
WRITTEN = "written"  # what the last linear gave, until its block ends
REASON = "passes the stream from one block's basis to the next"


class Shortcut(nn.Linear):
    """The matrix of a block, on the meta device until it is loaded.

    Args:
        width: K.
        writer: Path, in the block, of its last linear.
        dtype: Of the matrix.
    """

    def __init__(self, width: int, writer: str, dtype: torch.dtype) -> None:
        super().__init__(width, width, bias=False, device="meta", dtype=dtype)
        self.writer = writer
        self.requires_grad_(False)


def shortcuts_note(count: int, width: int) -> str:
    """What a user must be told of `count` matrices [width, width] between blocks."""
    return (
        f"blocks have bases of their own: {count} matrices of {width} × {width} pass the stream "
        "between them. pocketlm.load runs that, and transformers after `import pocketlm.hf`; "
        "without it transformers warns and computes something else. Other engines do not load it."
    )


def add_shortcuts(model: PreTrainedModel, shortcuts: Mapping[str, str]) -> None:
    """Gives blocks their matrix; `connect_shortcuts` makes them use it.

    Args:
        model: On the meta device, or about to be loaded; changed in place.
        shortcuts: Path of a matrix → of its block's last linear, as the checkpoint spells them.

    Raises:
        UnsupportedModel: If the paths lead to no block and its linear.
    """
    modules = dict(model.named_modules())
    width = int(model.config.get_text_config().hidden_size)
    for path, writer in shortcuts.items():
        owner, _, leaf = path.rpartition(".")
        inner = writer.removeprefix(f"{owner}.")
        block = modules.get(owner, modules.get(f"{model.base_model_prefix}.{owner}"))
        if block is None or leaf != SHORTCUT or inner not in dict(block.named_modules()):
            raise UnsupportedModel("belongs to no block of this model.", where=path)
        block.add_module(SHORTCUT, Shortcut(width, inner, model.dtype))


def connect_shortcuts(model: PreTrainedModel) -> None:
    """Hooks the matrices in, once no linear will be replaced by another module."""
    for block in model.modules():
        shortcut = block._modules.get(SHORTCUT)
        if isinstance(shortcut, Shortcut):
            block.get_submodule(shortcut.writer).register_forward_hook(_keep)
            block.register_forward_hook(_leave)


def _keep(writer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    writer.__dict__[WRITTEN] = output


def _leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    shortcut = block.get_submodule(SHORTCUT)
    assert isinstance(shortcut, Shortcut)
    written = block.get_submodule(shortcut.writer).__dict__.pop(WRITTEN, None)
    if written is None:  # something stands in for the block
        return output
    hidden = shortcut(first_tensor(output) - written) + written
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
