"""Moves weights from a source into modules: piecewise, converted on the way, into reused memory."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocketlm.core.views import Rows, TensorSource
from pocketlm.models.bytes import PIECE_BYTES, require_finite
from pocketlm.models.names import NameMap


def load_into(
    source: TensorSource, name: str, target: Tensor, where: str = "the checkpoint"
) -> None:
    """Reads a tensor piece by piece into `target`, converting dtype and device on the way.

    Args:
        source: The checkpoint.
        name: The tensor.
        target: Contiguous, of the same number of elements.
        where: The checkpoint, for messages.

    Raises:
        SourceError: If it is cut off or not finite.
    """
    info = source.infos()[name]
    flat, start = target.view(-1), 0
    for chunk in source.chunks(name, PIECE_BYTES):
        values = torch.frombuffer(chunk, dtype=info.dtype)
        require_finite(name, values, where)
        flat[start : start + values.numel()].copy_(values)
        start += values.numel()


class Loader:
    """Gives modules their weights and takes them away again.

    Args:
        source: The checkpoint.
        names: Its names against the model's.
        model: On the meta device.
        device: Where weights go.
        dtype: What the model computes in.
    """

    def __init__(
        self,
        source: TensorSource,
        names: NameMap,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.names, self.model = source, names, model
        self.device, self.dtype = device, dtype
        self.replaced: dict[str, Rows] = {}  # tensor → what gives its rows instead of the source
        self._ahead: dict[str, Future[Tensor]] = {}  # parameter → what a thread reads of it
        self._reader: ThreadPoolExecutor | None = None
        self._pool: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def read(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """A parameter by itself, on the device, in memory of its own."""
        target = torch.empty(self._shape(parameter), dtype=dtype, device=self.device)
        self._load(parameter, target)
        return target

    def rows(self, parameter: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of a plainly bound parameter, on the device."""
        tensor = self.names.bindings[parameter].tensors[0]
        rows = self.replaced.get(tensor)
        found = self.source.rows(tensor, start, stop) if rows is None else rows(start, stop)
        return found.to(self.device, dtype)

    def _shape(self, parameter: str) -> torch.Size:
        return self.model.get_parameter(parameter).shape

    def fill(self, module: nn.Module, path: str) -> None:
        """Loads every parameter of a block, and the buffers that the checkpoint saves.

        Args:
            module: The block.
            path: Its path in the model.
        """
        for name, parameter in list(module.named_parameters()):
            target = self._take(name, tuple(parameter.shape), parameter.dtype)
            self._load(f"{path}.{name}", target)
            _set(module, name, nn.Parameter(target, requires_grad=False))
        for name, buffer in module.named_buffers():
            if f"{path}.{name}" in self.names.bindings:
                self._load(f"{path}.{name}", buffer)

    def prefetch(self, module: nn.Module, path: str) -> None:
        """Begins to read a block's plainly bound parameters into pinned memory, for `fill`.

        Args:
            module: The block.
            path: Its path in the model.
        """
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "pocketlm-reader")
        self._ahead = {}  # of a block that was never asked for
        for name, _ in module.named_parameters():
            binding = self.names.bindings[f"{path}.{name}"]
            if binding.plain:
                self._ahead[f"{path}.{name}"] = self._reader.submit(self._read, binding.tensors[0])

    def _read(self, tensor: str) -> Tensor:
        return self.source.read(tensor).pin_memory()

    def _load(self, parameter: str, target: Tensor) -> None:
        binding = self.names.bindings[parameter]
        rows = self.replaced.get(binding.tensors[0])
        ahead = self._ahead.pop(parameter, None)
        if ahead is not None and rows is None:
            target.copy_(ahead.result().view(target.shape), non_blocking=True)
        elif rows is not None:
            target.copy_(rows(0, target.shape[0]))
        elif binding.plain and target.is_contiguous():
            load_into(self.source, binding.tensors[0], target)
        else:
            target.copy_(binding.convert(self.source, self.model))

    def empty(self, module: nn.Module) -> None:
        """Takes the weights out of a block; their memory serves the next block of such shapes."""
        self._pool.clear()
        for name, parameter in list(module.named_parameters()):
            shape, dtype = tuple(parameter.shape), parameter.dtype
            if not parameter.is_meta:
                self._pool[name, shape, dtype] = parameter.detach()
            meta = torch.empty(shape, dtype=dtype, device="meta")
            _set(module, name, nn.Parameter(meta, requires_grad=False))

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        free = self._pool.pop((name, shape, dtype), None)
        return torch.empty(shape, dtype=dtype, device=self.device) if free is None else free


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
