"""A checkpoint seen through edits: the smaller model, made tensor by tensor as it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.errors import SourceError
from pocketlm.core.views import TensorInfo, TensorSource
from pocketlm.models.bytes import byte_view, require_finite

WHERE = "the changed model"


class EditedSource:
    """A TensorSource that applies edits as tensors are read; copies pass through unseen.

    Args:
        source: The original.
        changes: What is made of it.
        dtype: Of tensors that are no copies; None: as they are written, rounded to the source's.
    """

    def __init__(
        self, source: TensorSource, changes: Changes, dtype: torch.dtype | None = None
    ) -> None:
        self._source, self._changes, self._dtype = source, changes, dtype
        self._edits = {edit.name: edit for edit in changes.edits}
        infos = source.infos()
        self._infos: dict[str, TensorInfo] = {}
        for edit in changes.edits:
            first = infos[edit.parts[0][0]]
            made = first.dtype if dtype is None or edit.copies else dtype
            self._infos[edit.name] = TensorInfo(edit.name, made, edit.shape(first.shape))

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the result, in the order of the edits."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """The whole tensor, edited; the caller owns the memory.

        Raises:
            SourceError: If it is absent, cut off, or not finite.
        """
        edit = self._edits.get(name)
        if edit is None:
            raise SourceError(f"holds no tensor '{name}'.", where=WHERE)
        value = edit.make(self._source.read, self._infos[name].dtype)
        require_finite(name, value, WHERE)
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of the edited tensor."""
        edit = self._edits.get(name)
        if edit is not None and edit.copies:
            return self._source.rows(edit.parts[0][0], start, stop)
        return self.read(name)[start:stop].clone()

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[bytes | memoryview]:
        """The edited tensor's raw bytes, in order."""
        edit = self._edits.get(name)
        if edit is not None and edit.copies:
            yield from self._source.chunks(edit.parts[0][0], bytes_at_once)
            return
        view, step = byte_view(self.read(name)), max(8, bytes_at_once // 8 * 8)
        for start in range(0, len(view), step):
            yield view[start : start + step]

    def fingerprint(self) -> str:
        """A digest of the source's and of the names and shapes that the edits give."""
        shapes = [(info.name, info.shape) for info in self._infos.values()]
        return hashlib.sha256(repr((self._source.fingerprint(), shapes)).encode()).hexdigest()
