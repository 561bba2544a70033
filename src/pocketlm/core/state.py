"""What a linear step gets and gives: one linear's weight on its way through a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stats import Stat
from pocketlm.core.stored import SparsitySpec, WeightSpec
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt, WeightTensor

S = TypeVar("S", bound=Stat)


@dataclass(frozen=True)
class Note:
    """Something a user must be told: a fallback, a skip, an approximation.

    Attributes:
        kind: One word for filters, such as ``damping`` or ``group_size``.
        text: A sentence.
        data: Numbers behind it, plain JSON.
    """

    kind: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearState:
    """One linear between two steps.

    Attributes:
        name: Module path.
        reference_OI: What every step approximates, float32 [O, I]: the original, after folds.
        asked: The number format the recipe asks for, its groups fitted to these columns; None: the
            values stay floats.
        scale_dtype: The dtype in which scales are stored, where they are plain floats.
        current: The compressed weight so far; None before the first step.
        notes: What the steps have to tell, oldest first.
        shared_absmax: The largest magnitude among the linears that share one constant of the
            tensor (NVFP4: engines fuse those that read one value); None: this one's own.
        inputs: How the model will round what this linear reads; None: not at all. Statistics of
            linear steps are of inputs so rounded, those of folds of the inputs as they come.
        mask_OI: Bool: which weights stay, the others are zero from here on; None: all do. A step
            that makes a mask also moves `reference_OI` to the pruned weight, so that what follows
            approximates that.
    """

    name: str
    reference_OI: Tensor
    asked: QuantSpec | None
    scale_dtype: torch.dtype
    current: WeightTensor | None = None
    notes: tuple[Note, ...] = ()
    shared_absmax: float | None = None
    inputs: ActivationSpec | None = None
    mask_OI: Tensor | None = None

    @property
    def spec(self) -> QuantSpec:
        """The number format the recipe asks for.

        Raises:
            ConfigError: If it asks for none.
        """
        if self.asked is None:
            raise ConfigError(
                "a step needs a number format, and the recipe names none.",
                where=self.name,
                remedy="Give --scheme W4A16, or `weights` in the recipe.",
            )
        return self.asked

    def masked(self, level_OI: Tensor) -> Tensor:
        """Levels or values [O, I] with zeros where the mask keeps nothing."""
        return level_OI if self.mask_OI is None else level_OI * self.mask_OI

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.reference_OI.shape
        return rows, columns

    def with_current(self, current: WeightTensor, *notes: Note) -> LinearState:
        """The same linear with a new compressed weight and further notes."""
        return replace(self, current=current, notes=(*self.notes, *notes))

    def grid(self) -> Packed | None:
        """The grid an earlier step chose, if it is of the asked spec; its codes are advisory."""
        current = self.current
        if self.asked is None:
            return None
        if isinstance(current, PackedFloat):
            return current if current.spec == self.spec else None
        if self.spec.type != "int":
            return None
        if not isinstance(current, PackedInt) or current.bits != self.spec.bits:
            return None
        same_group = current.group_size == (self.spec.group_size or self.reference_OI.shape[1])
        same_zero = (current.zero_OG is None) == self.spec.symmetric
        return current if same_group and same_zero else None


class Statistics:
    """The statistics gathered for one group of linears, by class."""

    def __init__(self, *stats: Stat) -> None:
        self._by_class = {type(stat): stat for stat in stats}

    def beside(self, stat: Stat) -> Statistics:
        """These and one more."""
        return Statistics(*self._by_class.values(), stat)

    def __getitem__(self, kind: type[S]) -> S:
        """The gathered statistic of class `kind`.

        Raises:
            KeyError: If the step did not declare that it needs it.
        """
        stat = self.get(kind)
        if stat is None:
            raise KeyError(kind.__name__)
        return stat

    def get(self, kind: type[S]) -> S | None:
        """The gathered statistic of class `kind`, or None where none was gathered."""
        stat = self._by_class.get(kind)
        return stat if isinstance(stat, kind) else None


@dataclass(frozen=True)
class Cost:
    """What a step takes for one linear, for `plan`.

    Attributes:
        bytes_held: Memory beside the weight, its statistics and the result.
        flops: Floating-point operations of the arithmetic that scales.
        calls: Small tensor operations in sequence, whose overhead counts.
        bytes_moved: Read and written by updates that do one operation an element, as a sweep over
            columns does.
        kernel: Whether on a GPU kernels do it: calls and moves hide behind the arithmetic there.
    """

    bytes_held: int
    flops: float
    calls: int
    bytes_moved: float = 0.0
    kernel: bool = False


class LinearStep(Protocol):
    """A step that treats each linear alone: a pure function of its inputs.

    It never registers hooks, prints, reads the clock or the environment.
    """

    kind: ClassVar[str]  # "linear"
    needs: ClassVar[tuple[type[Stat], ...]]
    preserves: ClassVar[frozenset[str]]  # of {"mask", "grid", "shape", "factors", "values"}
    makes: ClassVar[frozenset[str]]  # of {"mask", "grid", "factors"}: what it decides of the result

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The state after this step."""
        ...

    def cost(self, rows: int, columns: int) -> Cost:
        """What `compress` takes for a weight [rows, columns]."""
        ...


class Factoring(Protocol):
    """What a step that makes factors says of its result, before a weight is read."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of linears that it names: each must match some."""
        ...

    @property
    def idle(self) -> bool:
        """Whether its options ask for nothing, such as a ratio of 0."""
        ...

    def form(self, name: str, shape: tuple[int, int], before: WeightSpec, dtype: str) -> WeightSpec:
        """In what form a linear is after this step; `before` where it leaves it alone.

        Args:
            name: Module path.
            shape: (O, I).
            before: Its form before.
            dtype: Of 16-bit values.
        """
        ...


class FoldStep(Protocol):
    """A step that moves scales between a producer and the linears that read it, before any other.

    The block's function stays: what the producer gives is divided, the readers' columns multiplied.
    Statistics are those of the original block, all groups at once.
    """

    kind: ClassVar[str]  # "fold"
    needs: ClassVar[tuple[type[Stat], ...]]
    preserves: ClassVar[frozenset[str]]
    makes: ClassVar[frozenset[str]]  # always empty

    def scale(self, linears: Sequence[LinearState], stats: Statistics) -> Tensor | None:
        """A positive scale [I] for the columns of a group's linears; None leaves them alone."""
        ...

    def cost(self, rows: int, columns: int) -> Cost:
        """What `scale` takes for a weight [rows, columns]."""
        ...


class BlockTask(Protocol):
    """What a block step is given: the linears of a block, and the block as a function of them."""

    states: Mapping[str, LinearState]
    batches: int
    device: torch.device

    def inputs(self, batch: int) -> Tensor:
        """The block's input [B, T, D] as the compressed model so far gives it."""
        ...

    def targets(self, batch: int) -> Tensor:
        """What the original block gives for the original model's input [B, T, D]."""
        ...

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """The block's output [B, T, D] for `inputs(batch)`, differentiable in the weights.

        Args:
            weights: Module path → weight [O, I]; others stay as they are.
            batch: Which batch.
        """
        ...

    def generator(self) -> torch.Generator:
        """Randomness of this block: the same after a resume."""
        ...

    @property
    def report(self) -> Callable[[int, int, float], None]:
        """Told how far the step has come: iterations done, in all, loss."""
        ...


class BlockStep(Protocol):
    """A step that treats the linears of a block together, against the block's output."""

    kind: ClassVar[str]  # "block"
    needs: ClassVar[tuple[type[Stat], ...]]  # always empty
    preserves: ClassVar[frozenset[str]]
    makes: ClassVar[frozenset[str]]

    def compress(self, task: BlockTask) -> Mapping[str, LinearState]:
        """The states of all linears of the block after this step."""
        ...

    def flops_per_weight(self, samples: int, seq_len: int) -> float:
        """FLOPs of the whole step for each weight of the block."""
        ...

    def cost(self, rows: int, columns: int) -> Cost:
        """What it holds for a weight [rows, columns] beside the block's activations."""
        ...


class Survey(Protocol):
    """What a step wants to know of the whole original model before the run begins."""

    @property
    def needs(self) -> tuple[type[Stat], ...]:
        """Statistics of the original inputs."""
        ...

    @property
    def sequences(self) -> int:
        """How many `look` runs a block on, forward and back; 0: it only reads weights."""
        ...

    @property
    def look(
        self,
    ) -> Callable[[BlockTask, Mapping[str, Statistics], float], Mapping[str, Sequence[float]]]:
        """A few numbers of each linear of a block, from the block, statistics, and mean share."""
        ...

    @property
    def spread(
        self,
    ) -> Callable[[Mapping[str, Sequence[float]], Mapping[str, int], float], Mapping[str, float]]:
        """Shares by name, from those numbers, the linears' weights and the mean share."""
        ...


class PruningStep(Protocol):
    """What a step that makes a mask tells beside what it does."""

    @property
    def sparsity(self) -> SparsitySpec:
        """How sparse all linears become together."""
        ...

    @property
    def survey(self) -> Survey | None:
        """What decides how sparse each becomes; None: that is settled."""
        ...

    def kept(self, name: str, shape: tuple[int, int]) -> int:
        """How many weights of a linear stay."""
        ...

    def sparsity_of(self, name: str) -> SparsitySpec:
        """How sparse a linear becomes."""
        ...


Step = LinearStep | FoldStep | BlockStep
