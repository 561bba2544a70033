"""Matrices between blocks whose streams are written in bases of their own (SliceGPT, Qᵀ Q' on the
residual: arXiv:2401.15024, section 3.3).

    y' = y (Qᵀ Q'),    Q the basis of the block before, Q' that of this block, both [D, K]

is what a block is given instead of y. The matrix is a linear of the block, which transformers loads
and saves like any other parameter; a hook puts it in front of the block's own forward.

Legend: D hidden width of the original, K columns kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pocketlm.core.errors import UnsupportedModel
from pocketlm.models.call import HIDDEN

SHORTCUT = "shortcut"  # the linear's name in its block
REASON = "passes the stream from one block's basis to the next"


def shortcuts_note(count: int, width: int) -> str:
    """What a user must be told of `count` matrices [width, width] between blocks."""
    return (
        f"blocks have bases of their own: {count} matrices of {width} × {width} pass the stream "
        "between them. pocketlm.load runs that, and transformers after `import pocketlm.hf`; "
        "without it transformers warns and computes something else. Other engines do not load it."
    )


def add_shortcuts(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Gives blocks a linear [K, K] on the meta device that their input passes first.

    Args:
        model: On the meta device, or about to be loaded; changed in place.
        paths: Of the linears, as the checkpoint spells them.

    Raises:
        UnsupportedModel: If a path leads to no block.
    """
    modules = dict(model.named_modules())
    width = int(model.config.get_text_config().hidden_size)
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        known = owner if owner in modules else f"{model.base_model_prefix}.{owner}"
        if known not in modules or leaf != SHORTCUT:
            raise UnsupportedModel("is no place between two blocks of this model.", where=path)
        linear = nn.Linear(width, width, bias=False, device="meta", dtype=model.dtype)
        modules[known].add_module(SHORTCUT, linear.requires_grad_(False))
        modules[known].register_forward_pre_hook(_pass, with_kwargs=True)


def _pass(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    shortcut = block.get_submodule(SHORTCUT)
    if shortcut.get_parameter("weight").is_meta:  # something stands in for the block
        return None
    if HIDDEN in kwargs:
        return args, {**kwargs, HIDDEN: shortcut(kwargs[HIDDEN])}
    return (shortcut(args[0]), *args[1:]), kwargs
