"""How a smaller model is made of a larger one: per-tensor edits, applied as tensors stream through.

Every tensor of the result is an `Edit`: a weighted sum of tensors of the source, then operations in
order. An edit without operations is a copy, whose bytes are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """One step of an edit: a function of a tensor that knows the shape of its result."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for a tensor of that shape."""
        ...

    def __call__(self, value: Tensor) -> Tensor:
        """The result."""
        ...


@dataclass(frozen=True, eq=False)
class Take:
    """Keeps some indices of an axis, in the order given.

    Attributes:
        axis: Which.
        index: int64 [kept].
    """

    axis: int
    index: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with that axis shortened."""
        return (*shape[: self.axis], len(self.index), *shape[self.axis + 1 :])

    def __call__(self, value: Tensor) -> Tensor:
        """The kept part."""
        return value.index_select(self.axis, self.index.to(value.device))


@dataclass(frozen=True, eq=False)
class Zero:
    """Sets some indices of an axis to zero: what cutting them must be equal to."""

    axis: int
    index: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def __call__(self, value: Tensor) -> Tensor:
        """The tensor with zeros."""
        return value.index_fill(self.axis, self.index.to(value.device), 0.0)


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies along one axis, in float64.

    Attributes:
        axis: Which.
        factor: One for each index of the axis.
    """

    axis: int
    factor: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def __call__(self, value: Tensor) -> Tensor:
        """The product."""
        sides = [1] * value.dim()
        sides[self.axis] = -1
        return value.double() * self.factor.to(value.device, torch.float64).view(sides)


@dataclass(frozen=True, eq=False)
class Rotate:
    """Multiplies one axis with a matrix, in float64: value ·ₐ Q.

    Attributes:
        axis: Which.
        matrix: Q, [old, new].
    """

    axis: int
    matrix: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with that axis as wide as the matrix."""
        return (*shape[: self.axis], self.matrix.shape[1], *shape[self.axis + 1 :])

    def __call__(self, value: Tensor) -> Tensor:
        """The product."""
        moved = value.double().movedim(self.axis, -1) @ self.matrix.to(value.device, torch.float64)
        return moved.movedim(-1, self.axis)


@dataclass(frozen=True, eq=False)
class Add:
    """Adds a tensor of the same shape."""

    term: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def __call__(self, value: Tensor) -> Tensor:
        """The sum, in float64."""
        return value.double() + self.term.to(value.device, torch.float64)


@dataclass(frozen=True, eq=False)
class Constant:
    """Takes a tensor's place, whatever it was."""

    value: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the constant."""
        return tuple(self.value.shape)

    def __call__(self, value: Tensor) -> Tensor:
        """The constant."""
        return self.value


@dataclass(frozen=True, eq=False)
class Edit:
    """How one tensor of the result is made.

    Attributes:
        name: In the result.
        parts: Tensors of the source and their weights in the sum; the first gives dtype and shape.
        operations: What is done to the sum, in order.
        account: What the ledger says of the first part.
    """

    name: str
    parts: tuple[tuple[str, float], ...]
    operations: tuple[Operation, ...] = ()
    account: str = ""

    @property
    def copies(self) -> bool:
        """Whether the bytes stay."""
        return not self.operations and self.parts == ((self.parts[0][0], 1.0),)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The result's shape, for parts of that shape."""
        for operation in self.operations:
            shape = operation.shape(shape)
        return shape

    def make(self, read: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor.

        Args:
            read: Gives a tensor of the source.
            dtype: Of the result; None: that of its first part.
        """
        name, weight = self.parts[0]
        value = read(name)
        dtype = value.dtype if dtype is None else dtype
        if len(self.parts) > 1 or weight != 1.0:
            value = value.double() * weight
            for name, weight in self.parts[1:]:
                value += read(name).double() * weight
        for operation in self.operations:
            value = operation(value)
        return value.to(dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Changes:
    """A smaller model, described by its source.

    Attributes:
        config: Keys of the text model's configuration with their new values.
        edits: Every tensor of the result.
        dropped: Tensors of the source that no edit reads → why.
        summary: What was done, as a sentence for people.
        detail: Which units it was done to; depends on what was measured.
        notes: What a user must be told, as sentences.
        shortcuts: New modules, by path, that pass the stream from one block's basis to the next →
            the block's last linear, which writes in the next basis already.
    """

    config: Mapping[str, Any]
    edits: tuple[Edit, ...]
    dropped: Mapping[str, str]
    summary: str = ""
    detail: str = ""
    notes: tuple[str, ...] = ()
    shortcuts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Summary and detail."""
        return f"{self.summary}: {self.detail}" if self.detail else self.summary
