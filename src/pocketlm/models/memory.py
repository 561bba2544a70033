"""A transformers model in memory as a source of tensors, under the names it would be saved with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from pocketlm.core.errors import SourceError
from pocketlm.core.views import TensorInfo
from pocketlm.models.bytes import byte_view, require_finite

WHERE = "the model in memory"


class MemorySource:
    """A TensorSource over named tensors; tied ones are given once by whoever makes the mapping.

    Args:
        tensors: Checkpoint name → tensor. Not copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._infos = {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the model's order."""
        return self._infos

    def _get(self, name: str) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise SourceError(f"holds no tensor '{name}'.", where=WHERE)
        return tensor.detach()

    def read(self, name: str) -> Tensor:
        """A CPU copy of the tensor.

        Raises:
            SourceError: If it is absent or not finite.
        """
        tensor = self._get(name).to("cpu", copy=True).contiguous()
        require_finite(name, tensor, WHERE)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A CPU copy of rows start to stop.

        Raises:
            SourceError: If it is absent or not finite.
        """
        rows = self._get(name)[start:stop].to("cpu", copy=True).contiguous()
        require_finite(name, rows, WHERE)
        return rows

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[memoryview]:
        """The tensor's raw bytes in order, a few rows at a time."""
        tensor = self._get(name)
        if tensor.dim() == 0:
            yield byte_view(tensor.to("cpu", copy=True))
            return
        row_bytes = max(1, tensor.numel() * tensor.element_size() // max(1, tensor.shape[0]))
        step = max(1, bytes_at_once // row_bytes)
        for start in range(0, tensor.shape[0], step):
            yield byte_view(tensor[start : start + step].to("cpu", copy=True).contiguous())

    def fingerprint(self) -> str:
        """A digest of names, dtypes, shapes and all values."""
        digest = hashlib.sha256()
        for name, info in sorted(self._infos.items()):
            digest.update(repr((name, str(info.dtype), info.shape)).encode())
            for chunk in self.chunks(name, 1 << 24):
                digest.update(chunk)
        return digest.hexdigest()
