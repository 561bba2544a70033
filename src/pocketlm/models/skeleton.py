"""A model without weights: parameters on the meta device, buffers computed for real.

Buffers such as rotary frequencies come out of the model's own constructor, so nothing about them
needs to be known here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pocketlm.core.errors import UnsupportedModel


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and where its blocks are.

    Attributes:
        model: The causal language model.
        blocks: The decoder blocks, in order.
        block_paths: Their paths in `model`.
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    block_paths: tuple[str, ...]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep real buffers, but their parameters go to the meta device at once.

    A parameter is moved before it is initialised: `torch.empty` touches no memory, so even a
    large embedding costs none.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
            # transformers then draws no values for it
            param._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Skeleton:
    """Builds a causal language model without weights.

    Args:
        config: transformers' configuration.
        dtype: What the model computes in.
        trust_remote_code: Whether code from the checkpoint may run.

    Returns:
        The model and its decoder blocks.

    Raises:
        UnsupportedModel: If transformers has no such causal LM, or no decoder blocks are found.
    """
    with parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                experts_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
        except (ValueError, ImportError) as error:
            raise UnsupportedModel(
                f"transformers {transformers.__version__} cannot build it as a causal LM: {error}",
                where=config.model_type,
            ) from error
    model.eval().requires_grad_(False)
    return find_blocks(model)


def skeleton_like(
    model: PreTrainedModel, dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> Skeleton:
    """The same model without weights, perhaps with other sizes.

    Args:
        model: In memory or a skeleton; left as it is.
        dtype: What the skeleton computes in.
        changes: Keys of the text model's configuration with their new values.

    Raises:
        UnsupportedModel: If no decoder blocks are found, or transformers cannot build these sizes.
    """
    config = copy.deepcopy(model.config)
    try:
        if changes:
            config = _with_changes(config, changes)
        with parameters_on_meta():
            bare = type(model)._from_config(config, dtype=dtype, experts_implementation="eager")
    except (StrictDataclassError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot build these sizes: {error}",
            where=type(model).__name__,
        ) from error
    bare.eval().requires_grad_(False)
    return find_blocks(bare)


def _with_changes(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """A configuration made anew, so that what depends on a changed key follows."""
    text = config.get_text_config()
    made = type(text).from_dict({**text.to_dict(), **changes})
    if text is config:
        return made
    part = next(name for name, value in vars(config).items() if value is text)
    setattr(config, part, made)
    return config


def find_blocks(model: PreTrainedModel) -> Skeleton:
    """Finds the decoder blocks: the longest outermost list of modules inside the decoder.

    Raises:
        UnsupportedModel: If there is none.
    """
    decoder = model.get_decoder()
    lists: dict[str, nn.ModuleList] = {}
    for path, module in decoder.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        # A block has children of its own, unlike the entries of a list of heads or norms.
        if isinstance(module, nn.ModuleList) and not inside and _have_children(module):
            lists[path] = module
    if not lists:
        raise UnsupportedModel("no list of decoder blocks was found.", where=type(model).__name__)
    path = max(lists, key=lambda p: len(lists[p]))
    path_of = {id(module): path for path, module in model.named_modules()}
    return Skeleton(
        model=model,
        blocks=tuple(lists[path]),
        block_paths=tuple(path_of[id(block)] for block in lists[path]),
    )


def _have_children(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(any(True for _ in module.children()) for module in modules)
