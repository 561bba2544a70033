"""Transform steps: decide from statistics of the whole model, then give edits of its tensors.

A transform is a barrier of a recipe: what it gives is a complete, smaller model, which the next
step takes as its source.
Legend: B sequences, T tokens, I input columns, L blocks, U units of a structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.views import BlockView

Findings = list[dict[str, Tensor]]  # of each block: small tensors by name
Altered = Callable[[BlockView, Mapping[str, Tensor]], Callable[[Tensor], Tensor]]
CHANNELS, HEADS, HIDDEN, EXPERTS = "channels", "heads", "hidden", "experts"


@dataclass(frozen=True)
class Cut:
    """Where the units of a structure lie in one tensor.

    Attributes:
        tensor: Its name in the checkpoint.
        axis: Which axis is shortened.
        width: Neighbouring indices of a unit (a head's rows, times the queries of a value head).
        copies: How often the units are laid out one after the other (gate and up in one tensor).
    """

    tensor: str
    axis: int
    width: int = 1
    copies: int = 1

    def index(self, units_U: Tensor, units: int) -> Tensor:
        """The indices of some of `units` units along the axis, ascending copy by copy."""
        inside = torch.arange(self.width)
        starts = torch.arange(self.copies)[:, None, None] * (units * self.width)
        return (starts + units_U[None, :, None] * self.width + inside).reshape(-1)


@dataclass(frozen=True)
class Structure:
    """Dimensions that only change together.

    Attributes:
        dimension: "channels", "heads", "hidden" or "experts".
        path: The module they are in; empty for the whole model.
        block: Index of the block; -1 for the whole model.
        units: How many there are.
        cuts: Where they lie.
        readers: Linears, by module path, whose input columns are units: what is removed is what
            they no longer read. Of experts: all their linears, expert after expert.
        family: Structures of one family keep equally many units: a key of the configuration.
    """

    dimension: str
    path: str
    block: int
    units: int
    cuts: tuple[Cut, ...]
    readers: tuple[str, ...]
    family: str = ""

    def cut_of(self, tensor: str) -> Cut:
        """Where the units lie in a tensor."""
        return next(cut for cut in self.cuts if cut.tensor == tensor)


class Outline(Protocol):
    """A model's shape, and how smaller ones are described; no weight is read."""

    config: Mapping[str, Any]
    blocks: int

    def structures(self, dimension: str) -> Sequence[Structure]:
        """The structures of a dimension, block by block.

        Raises:
            UnsupportedModel: If the configuration has no such dimension.
        """
        ...

    def keep_blocks(
        self, kept: Sequence[int], merged: Mapping[int, Mapping[int, float]] | None = None
    ) -> Changes:
        """The model with some of its blocks, renumbered.

        Args:
            kept: Indices, ascending.
            merged: Kept block → other blocks and the weights with which they are added to it.

        Raises:
            ConfigError: If none is kept.
        """
        ...

    def cut(
        self,
        kept: Mapping[str, Mapping[str, Tensor]],
        biases: Mapping[str, Tensor | None] | None = None,
    ) -> Changes:
        """The model with some units of each structure.

        Args:
            kept: Dimension → path of the structure → units [kept] in the order they shall have, as
                many of each family.
            biases: Reader → what is added to its output, where it can be held; None: not known yet,
                only that there will be something.
        """
        ...

    def keep_experts(self, kept: Mapping[str, Sequence[Mapping[int, float]]]) -> Changes:
        """The model with fewer experts.

        Args:
            kept: Path of the mixture → for each expert that stays, experts of the original and
                their weights in its sum; the first is the one whose router row it takes.

        Raises:
            ConfigError: If too few stay, or more in some mixtures than in others.
        """
        ...

    @property
    def hidden(self) -> int:
        """Width of the stream between blocks."""
        ...

    def rotate(self, matrices: Sequence[Tensor]) -> Changes:
        """The model with its stream turned and cut to the columns of matrices.

        Args:
            matrices: One for all blocks, or one for each and one for the head; orthonormal columns
                [D, K], float64. Then a block's last linear writes in the basis of the next.

        Raises:
            UnsupportedLayer: If the model's norms do not allow it, or it cannot be proved.
        """
        ...

    def writers(self, index: int) -> tuple[Sequence[str], Sequence[str]]:
        """Tensors by which a block writes into the stream: its last linear's, and those before.

        Raises:
            UnsupportedLayer: As for `rotate`.
        """
        ...

    def loadable(self, dimension: str, units: int, family: str = "") -> str | None:
        """Why no model with so many units can be built; None where it can."""
        ...

    def parameters(self, structure: Structure) -> int:
        """Weights of one unit of a structure."""
        ...

    def block_weights(self) -> int:
        """Weights of all decoder blocks."""
        ...


class Visit(Protocol):
    """One block on the way of the calibration text through the original model."""

    index: int
    block: BlockView

    def rehearse(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs every batch through the block; the next block will not see it.

        Yields:
            Each batch's input and output [B, T, D].
        """
        ...

    def run(
        self,
        on_group: Callable[[int, Tensor], None] | None = None,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs every batch through the block, once.

        Args:
            on_group: Called with each group's index and input [..., I] before it is computed.
            enter: What is done to each batch's input first; None: nothing.

        Yields:
            Each batch's input and output [B, T, D].
        """
        ...


class Survey(Protocol):
    """What a transform can find out; every pass streams the blocks."""

    outline: Outline

    def visit(
        self, look: Callable[[Visit], dict[str, Tensor]], alter: Altered | None = None
    ) -> Findings:
        """Runs the calibration text through the model; what `look` finds of a block is kept.

        A run that was stopped goes on after the last finished block.

        Args:
            look: May change the block before it runs the batches: later blocks see what it gives.
            alter: Changes a block so again, by what was found, when a run goes on; gives what is
                done to the block's input.
        """
        ...

    def removal_losses(self) -> Tensor:
        """Log-perplexity of the model without block i [L], for every i alone."""
        ...

    def gradients(
        self, look: Callable[[int, BlockView, Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> Findings:
        """Hands the loss's gradient in each linear's weight [O, I] to `look`, last block first.

        Returns:
            What `look` found, by block.
        """
        ...

    def distance(self, changes: Changes) -> float:
        """Mean cosine between the last hidden states of the model and of a changed one."""
        ...


class Transform(Protocol):
    """A step that makes a smaller model.

    `measure` reads the model and the text; `changes` is a pure function of the model's shape and of
    what was measured. Without findings it gives changes of the same sizes, for `plan`.
    """

    kind: ClassVar[str]  # "transform"

    def measure(self, survey: Survey) -> Findings:
        """What the decision rests on; kept in the work directory."""
        ...

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The decision.

        Raises:
            ConfigError: If it would remove everything, or cannot be loaded.
        """
        ...
