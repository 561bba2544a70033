"""What methods and the engine see of a model: blocks, groups, folds. Implemented by models/.

Legend: B sequences, T tokens, D hidden width, V vocabulary, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer

Rows = Callable[[int, int], Tensor]  # start, stop → rows of a weight [stop - start, D]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, before it is read.

    Attributes:
        name: Its name in the checkpoint.
        dtype: As it will be written again (a GGUF block type is read as float16 or float32).
        shape: As stored.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes_stored(self) -> int:
        """Bytes of the raw tensor in `dtype`."""
        count = 1
        for side in self.shape:
            count *= side
        return count * torch.empty(0, dtype=self.dtype).element_size()


class TensorSource(Protocol):
    """A checkpoint's tensors by name, read on demand, never mapped into memory."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in a stable order."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU; the caller owns the memory."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor's first axis."""
        ...

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[bytes | memoryview]:
        """Raw little-endian bytes in `dtype`, in order; a chunk is valid until the next."""
        ...

    def fingerprint(self) -> str:
        """Digest of names, shapes, dtypes, sizes and a content sample; equal means same source."""
        ...


@dataclass(frozen=True)
class Fold:
    """A place where a scale can move from a producer into the linears that read it.

    Attributes:
        producer: Module path of the norm or linear whose output columns can be divided.
        form: "weight" (w), "one_plus_weight" (1 + w) or "linear" (rows of a linear).
        accepted: Whether the float64 probe found the block's output unchanged.
        error: The probe's relative error; None where it could not run.
        reason: Why not, where refused.
        shared: Readers' columns that one producer row feeds (value heads of grouped queries).
        width: Neighbouring columns that belong together when shared: a head's.
    """

    producer: str
    form: str
    accepted: bool
    error: float | None
    reason: str | None = None
    shared: int = 1
    width: int = 1


@dataclass(frozen=True)
class Folded:
    """What a fold has changed.

    Attributes:
        scale_I: What the readers' columns were multiplied with: the asked scale, shared among the
            columns that one producer row feeds, and corrected for the producer's own rounding.
        tensors: The producer's tensors as they must be stored now, by checkpoint name; weights of
            linears are not among them.
    """

    scale_I: Tensor
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Linears that read one and the same value: they share statistics, and engines may fuse them.

    Attributes:
        index: Position in the order of execution within the block.
        linears: Module paths.
        fold: Where a scale on the shared input could go; None where nothing feeds it alone.
    """

    index: int
    linears: tuple[str, ...]
    fold: Fold | None = None


class LinearView(Protocol):
    """One linear of a loaded block; Conv1D and experts of fused tensors look the same."""

    name: str  # module path, as the checkpoint spells it: "model.layers.0.self_attn.q_proj"
    tensor_name: str  # of its weight in the checkpoint
    in_features: int
    out_features: int
    stored_transposed: bool  # [I, O] in the checkpoint (GPT-2's Conv1D)
    dtype: torch.dtype  # of the weight in the checkpoint

    def weight_OI(self) -> Tensor:
        """A float32 copy of the original weight, after folds, on the block's device."""
        ...

    def set_weight_OI(self, weight_OI: Tensor) -> None:
        """Replaces the weight that the block's forward uses."""
        ...

    def set_input_quantizer(self, quantizer: InputQuantizer | None) -> None:
        """What the block's forward rounds this linear's inputs with from now on; None: nothing."""
        ...


@dataclass(frozen=True)
class Pause:
    """A run stands before a group: its linears have not been computed yet.

    Attributes:
        group: Index of the group.
        inputs: The value that the group's linears read, [..., I], before it is rounded.
    """

    group: int
    inputs: Tensor


class BlockRun(Protocol):
    """One batch on its way through a block, stopped before each group of linears.

    Dropping a run frees what it holds; a run may skip groups (experts that get no token).
    """

    def advance(self) -> Pause | None:
        """Runs on to the next group; None once the block has finished and `output` is set."""
        ...

    @property
    def output(self) -> Tensor:
        """The block's output [B, T, D], after `advance` returned None."""
        ...


class BlockView(Protocol):
    """A decoder block with its weights in memory, in the dtype it computes in."""

    index: int
    path: str  # "model.layers.0"
    linears: Mapping[str, LinearView]  # by module path, in order of execution
    groups: tuple[Group, ...]  # in order of execution; every linear is in exactly one
    skipped: Mapping[
        str, str
    ]  # module path → why it is no linear to compress (routers, 3-D parameters)

    def start(self, hidden_BTD: Tensor, call: Any) -> BlockRun:
        """Begins a run on one batch; `call` is what ModelView.begin gave for it."""
        ...

    def forward(self, hidden_BTD: Tensor, call: Any) -> Tensor:
        """The block's output [B, T, D] without stops."""
        ...

    def forward_with(self, weights: Mapping[str, Tensor], hidden_BTD: Tensor, call: Any) -> Tensor:
        """The block's output with other weights [O, I], by module path; differentiable in them."""
        ...

    def watch_experts(self, take: Callable[[str, int, Tensor, Tensor], None] | None) -> None:
        """Tells from now on what each expert is given, where they are linears of their own.

        Args:
            take: Called with the mixture's path, the expert, the router's weights of its tokens
                [n] and the norms of its weighted outputs [n]; None: no longer.
        """
        ...

    def probe_folds(self) -> tuple[Group, ...]:
        """The groups with the best fold of each, tried in float64; seconds for a large block."""
        ...

    def fold(self, group: Group, scale_I: Tensor, dtype: torch.dtype | None) -> Folded:
        """Divides what a group's producer gives and multiplies the columns of its readers.

        Args:
            group: With an accepted fold.
            scale_I: Positive.
            dtype: In which the producer will be stored; None: its own.
        """
        ...

    def tensor(self, name: str) -> Tensor:
        """A parameter of the block, by its name in the checkpoint; not to be changed in place."""
        ...

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replaces a parameter of the block, by its name in the checkpoint."""
        ...


@dataclass(frozen=True)
class End:
    """The embedding or the head: a weight outside the blocks that can be compressed.

    Attributes:
        name: Module path, as the checkpoint spells it.
        tensor: Its weight in the checkpoint; that of the embedding for a tied head.
        shape: (V, D).
        embeds: Whether tokens are looked up in it.
        heads: Whether it gives the logits; both where the two are tied.
        tied_name: Module path of the head, where it is tied to this embedding.
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    embeds: bool
    heads: bool
    tied_name: str | None = None


class ModelView(Protocol):
    """A causal language model as a stream of blocks; at most one block's weights are in memory."""

    source: TensorSource
    config: Mapping[str, Any]  # config.json as it is in the source (quantization_config left out)
    block_paths: tuple[str, ...]
    dtype: torch.dtype  # of most weights in the checkpoint
    tied: bool  # head and embedding share one tensor
    repeated: tuple[str, ...]  # tensors that repeat the one they are tied to: not written again
    shortcuts: Mapping[str, str]  # module between two blocks' bases → the first's last linear
    vocabulary: int
    context: int  # longest position the model was made for
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def stores_transposed(self) -> bool:
        """Whether the checkpoint stores linears inside blocks as [I, O] (GPT-2's Conv1D)."""
        ...

    @property
    def other_names(self) -> Mapping[str, str]:
        """Module of a block, but no expert, as the checkpoint names it → as transformers does.

        Only where these differ.
        """
        ...

    def packing_refusal(self, target: str) -> str | None:
        """Why an engine cannot load its linears in compressed-tensors' form, as a clause; or None.

        Args:
            target: The engine.
        """
        ...

    def begin(self, tokens_BT: Tensor) -> tuple[Tensor, Any]:
        """Embeds a batch and records what each block will be called with.

        Returns:
            The first block's input [B, T, D], and a call to hand to every block's `start`.
        """
        ...

    def block(self, index: int) -> AbstractContextManager[BlockView]:
        """Loads one block; its memory is reused or freed when the context closes."""
        ...

    def prefetch(self, index: int) -> None:
        """Begins to read a block that will be asked for next, where that saves time."""
        ...

    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """The last block's output through the final norm: what the head reads."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 logits [N, V] of some finished positions; the caller keeps N small."""
        ...

    def loss_gradient(self, hidden_BTD: Tensor, tokens_BT: Tensor, positions: int) -> Tensor:
        """Gradient of the summed loss of the next tokens in the last block's output, [B, T, D].

        Args:
            hidden_BTD: The last block's output.
            tokens_BT: Token ids, int64.
            positions: How many have their logits in memory at once.
        """
        ...

    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(O, I) of every linear inside blocks, by module path, without reading a weight."""
        ...

    def ends(self) -> tuple[End, ...]:
        """Embedding and head, without reading them; one entry where they are tied."""
        ...

    def with_ends(self, rows: Mapping[str, Rows]) -> AbstractContextManager[None]:
        """Puts other values in place of ends' weights while the context is open.

        Args:
            rows: Tensor of an end → what gives its rows start to stop.
        """
        ...

    def side_files(self) -> Mapping[str, bytes]:
        """Files an artifact carries over: tokenizer, chat template, generation config, licence."""
        ...
