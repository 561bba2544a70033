"""What lies before and after the blocks: embedding, final norm, head, in bounded memory.

Small weights are loaded on first use and stay. Of a large embedding only the rows in use are read;
a large head is multiplied chunk by chunk. The model's own forward runs all the rest, so scaled
embeddings and capped logits need no mention here.
Legend: N positions, U distinct ids, D hidden width, V vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pocketlm.core.errors import UnsupportedModel
from pocketlm.core.views import End
from pocketlm.models.linear import is_linear
from pocketlm.models.load import Loader
from pocketlm.models.names import NameMap

KEEP_BYTES_CPU = 256 << 20  # the largest weight that stays in memory
KEEP_BYTES_ACCELERATOR = 4 << 30
CHUNK_BYTES = 64 << 20  # of a large head, in the dtype it computes in


def find_ends(model: PreTrainedModel, head: nn.Module, names: NameMap) -> tuple[End, ...]:
    """Embedding and head, without reading them; one entry where they are tied.

    A weight that no single tensor of the checkpoint holds is left out.

    Args:
        model: On the meta device.
        head: Its head.
        names: The checkpoint's names against the model's.
    """
    path_of = {id(module): path for path, module in model.named_modules()}
    found: list[End] = []
    for module, embeds in ((model.get_input_embeddings(), True), (head, False)):
        path = path_of[id(module)]
        binding = names.bindings[f"{path}.weight"]
        tensor, shape = binding.tensors[0], tuple(model.get_parameter(f"{path}.weight").shape)
        if not binding.plain or not tensor.endswith(".weight") or len(shape) != 2:
            continue
        if not embeds and found and tensor == found[0].tensor:
            found[0] = replace(found[0], heads=True, tied_name=path)
        elif isinstance(module, nn.Embedding if embeds else nn.Linear):
            found.append(End(tensor.removesuffix(".weight"), tensor, shape, embeds, not embeds))
    return tuple(found)


class Ends:
    """Loads what is outside the blocks when it is used.

    Args:
        loader: Reads weights.
        model: On the meta device.
        blocks: The decoder blocks, which are left alone.

    Raises:
        UnsupportedModel: If the head is no plain linear.
    """

    def __init__(
        self, loader: Loader, model: PreTrainedModel, blocks: tuple[nn.Module, ...]
    ) -> None:
        head = model.get_output_embeddings()
        if head is None or not is_linear(head):
            raise UnsupportedModel(
                "has no linear head over the vocabulary.", where=type(model).__name__
            )
        self._loader, self.head = loader, head
        self._path_of = {id(module): path for path, module in model.named_modules()}
        on_cpu = loader.device.type == "cpu"
        self._keep_bytes = KEEP_BYTES_CPU if on_cpu else KEEP_BYTES_ACCELERATOR
        self._kept: dict[str, Tensor] = {}  # by checkpoint tensor: a tied weight is kept once
        self._on_disk: dict[int, str] = {}  # embeddings too large to keep
        self._loading: list[nn.Module] = []
        inside = {id(module) for block in blocks for module in block.modules()}
        load = weakref.WeakMethod(self._load_on_use)

        def load_on_use(module: nn.Module, args: Any) -> None:
            # A hook that held this object would be a cycle: a dropped model's embedding would stay
            # until the garbage collector comes by.
            method = load()
            assert method is not None
            method(module, args)

        for module in model.modules():
            direct = list(module.parameters(recurse=False))
            if not direct or id(module) in inside or module is head:
                continue
            if isinstance(module, nn.Embedding) and not self._is_small(module.weight):
                self._on_disk[id(module.weight)] = f"{self._path_of[id(module)]}.weight"
            else:
                module.register_forward_pre_hook(load_on_use)
                self._loading.append(module)

    def _is_small(self, weight: Tensor) -> bool:
        return weight.numel() * weight.element_size() <= self._keep_bytes

    def _load_on_use(self, module: nn.Module, args: Any) -> None:
        path = self._path_of[id(module)]
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = self._keep(f"{path}.{name}" if path else name, parameter)
                setattr(module, name, nn.Parameter(value, requires_grad=False))

    def _keep(self, parameter: str, meta: Tensor) -> Tensor:
        key = self._loader.names.bindings[parameter].tensors[0]
        if key not in self._kept:
            self._kept[key] = self._loader.read(parameter, meta.dtype)
        return self._kept[key]

    def forget(self) -> None:
        """Drops what is kept, to be loaded again on its next use."""
        self._kept.clear()
        for module in self._loading:
            for name, parameter in list(module.named_parameters(recurse=False)):
                meta = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(meta, requires_grad=False))

    def reading_rows(self) -> ReadRows:
        """The mode under which embeddings that stay on disk can be called."""
        return ReadRows(self._loader, self._on_disk)

    def head_logits(self, hidden_ND: Tensor) -> Tensor:
        """What the head gives for some positions, [..., V], in the dtype it computes in."""
        path = self._path_of[id(self.head)]
        weight, bias = self.head.weight, self.head.bias
        if bias is not None:
            bias = self._keep(f"{path}.bias", bias)
        name = f"{path}.weight"
        if self._is_small(weight):
            return F.linear(hidden_ND, self._keep(name, weight), bias)
        rows = weight.shape[0]
        step = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
        logits_NV = hidden_ND.new_empty(*hidden_ND.shape[:-1], rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk_VD = self._loader.rows(name, start, stop, weight.dtype)
            chunk_bias = None if bias is None else bias[start:stop]
            logits_NV[..., start:stop] = F.linear(hidden_ND, chunk_VD, chunk_bias)
        return logits_NV


class ReadRows(TorchFunctionMode):
    """Serves lookups in embeddings that stay on disk: only the rows asked for are read.

    Args:
        loader: Reads rows.
        on_disk: id of an embedding's meta weight → its parameter name.
    """

    def __init__(self, loader: Loader, on_disk: dict[int, str]) -> None:
        super().__init__()
        self._loader, self._on_disk = loader, on_disk

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the function; a lookup in a weight that is on disk reads its rows first."""
        if func is F.embedding and id(args[1]) in self._on_disk:
            ids, weight = args[0], args[1]
            distinct_U, position = torch.unique(ids, return_inverse=True)
            rows_UD = self._read(self._on_disk[id(weight)], distinct_U.tolist(), weight)
            return F.embedding(position, rows_UD)
        return func(*args, **(kwargs or {}))

    def _read(self, name: str, ids: list[int], weight: Tensor) -> Tensor:
        rows_UD = torch.empty(
            len(ids), weight.shape[1], dtype=weight.dtype, device=self._loader.device
        )
        start = 0
        while start < len(ids):  # neighbours in the vocabulary are read at once
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1:
                stop += 1
            first, last = ids[start], ids[stop - 1] + 1
            rows_UD[start:stop] = self._loader.rows(name, first, last, weight.dtype)
            start = stop
        return rows_UD
