"""What the tensors of a checkpoint are: their part of the model, and their usual dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from pocketlm.core.views import TensorSource
from pocketlm.models.names import NameMap


def tensor_kinds(
    model: PreTrainedModel,
    head: nn.Module,
    names: NameMap,
    tensors: Iterable[str],
    linears: Iterable[str],
) -> dict[str, str]:
    """Every tensor → "linears", "embedding", "head", "norms", "other" or "extras".

    A tensor that repeats a tied one counts as "other".

    Args:
        model: Without weights.
        head: Its head.
        names: The checkpoint's names against the model's.
        tensors: Of the checkpoint, in its order.
        linears: Those of them that are weights of linears in blocks.
    """
    kinds = dict.fromkeys(tensors, "other")
    kinds.update(dict.fromkeys(names.extras, "extras"))
    axes = {name: p.dim() for name, p in model.named_parameters(remove_duplicate=False)}
    for name, binding in names.bindings.items():
        is_norm = name.endswith("weight") and axes.get(name) == 1
        kinds.update(dict.fromkeys(binding.tensors, "norms" if is_norm else "other"))
    kinds.update(dict.fromkeys(linears, "linears"))
    path_of = {id(module): path for path, module in model.named_modules()}
    for module, kind in ((head, "head"), (model.get_input_embeddings(), "embedding")):
        binding = names.bindings[f"{path_of[id(module)]}.weight"]
        kinds.update(dict.fromkeys(binding.tensors, kind))
    return kinds


def most_common_dtype(source: TensorSource, without: Collection[str] = ()) -> torch.dtype:
    """The dtype that most bytes of a checkpoint are stored in.

    Args:
        source: Its tensors.
        without: Those that do not count, such as compressed ones; not all of them.
    """
    bytes_of: dict[torch.dtype, int] = {}
    for name, info in source.infos().items():
        if name not in without:
            bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.bytes_stored
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])
