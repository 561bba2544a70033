"""A cache of keys and values of fixed size, in place: what one-token steps and CUDA graphs need.

transformers' own static cache drops what has left a sliding window and grows no more; this one
keeps every position of every layer, so that a conversation can be cut back and a graph replayed.
Models make their own masks from the sizes it tells them, windows included.

Legend: B rows, H heads of keys, T new positions, N capacity, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class StaticCache(Cache):
    """Keys and values of all layers, [B, H, N, D] each.

    Args:
        layers: How many.
        capacity: N.
        rows: B; None: as many as the first keys have. Fewer may be run: the first ones.

    Attributes:
        length: Positions that are held; the next are written after them. Whoever runs the model
            moves it on, once for all layers.
        slot: Where a step writes, as a tensor [1] that lives on; None outside graphs. Set, the
            step sees `seen` positions whatever `length` says, and masks tell which count.
        seen: Positions that attention reads in a graph.
        parts: The layers, by their own type.
    """

    def __init__(self, layers: int, capacity: int, rows: int | None = None) -> None:
        self.capacity, self.length, self.rows = capacity, 0, rows
        self.slot: Tensor | None = None
        self.seen = capacity
        self.parts = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self.parts))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions before the next: a number, in a graph a tensor."""
        return self.length if self.slot is None else self.slot[0]

    def grow(self, capacity: int) -> None:
        """Makes room; what is held stays. Graphs that read the old tensors are worthless then."""
        self.capacity = max(capacity, self.capacity)
        for part in self.parts:
            part.grow(self.capacity)

    def shift(self, rows: int, held: int, by: int) -> None:
        """Moves the held positions of the first rows to the right, or left over what was there."""
        old, new = max(0, -by), max(0, by)
        count = held - old
        for part in self.parts:
            for states in (part.keys, part.values):
                states[:rows, :, new : new + count] = states[:rows, :, old : old + count].clone()

    def take(self, row: int, stop: int, other: StaticCache, source: int, positions: slice) -> None:
        """Writes positions of another cache's row, or of an own one, so that they end at `stop`."""
        start = stop - (positions.stop - positions.start)
        for part, theirs in zip(self.parts, other.parts, strict=True):
            if not part.is_initialized:
                part.lazy_initialization(theirs.keys, theirs.values)
            part.keys[row, :, start:stop] = theirs.keys[source, :, positions]
            part.values[row, :, start:stop] = theirs.values[source, :, positions]

    def position_bytes(self) -> int:
        """What one position of one row takes, once a forward has told the widths."""
        states = [tensor[0, :, 0] for part in self.parts for tensor in (part.keys, part.values)]
        return sum(state.numel() * state.element_size() for state in states)


class _Layer(CacheLayerMixin):
    """One layer's part; the cache knows the place."""

    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]: set before it is read
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    is_sliding = False  # it keeps all positions; the model's mask applies the window

    def __init__(self, cache: StaticCache) -> None:
        super().__init__()
        self._cache = cache

    @property
    def is_compileable(self) -> bool:
        """In a graph, a mask is always made: its absence would depend on the length."""
        return self._cache.slot is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and widths from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = self._cache.rows or key_states.shape[0]
        self.keys = _room(key_states, rows, self._cache.capacity)
        self.values = _room(value_states, rows, self._cache.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, H, T, D] and gives what attention may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, rows = self._cache, key_states.shape[0]
        keys, values = self.keys[:rows], self.values[:rows]
        if cache.slot is not None:
            keys.index_copy_(2, cache.slot, key_states)
            values.index_copy_(2, cache.slot, value_states)
            return keys[:, :, : cache.seen], values[:, :, : cache.seen]
        start, stop = cache.length, cache.length + key_states.shape[2]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        return keys[:, :, :stop], values[:, :, :stop]

    def grow(self, capacity: int) -> None:
        """Moves all positions into larger tensors."""
        if self.is_initialized and capacity > self.keys.shape[2]:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = _room(old, old.shape[0], capacity)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions attention reads, and the first of them."""
        cache = self._cache
        return (cache.length + query_length if cache.slot is None else cache.seen), 0

    def get_seq_length(self) -> Any:
        """As the cache says."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """The capacity."""
        return self._cache.capacity

    def get_max_cache_shape(self) -> int:
        """The capacity, under the name that older versions of transformers ask for."""
        return self._cache.capacity


def _room(like: Tensor, rows: int, capacity: int) -> Tensor:
    _, heads, _, width = like.shape
    return torch.zeros(rows, heads, capacity, width, dtype=like.dtype, device=like.device)


def refuses_static(model: PreTrainedModel) -> str | None:
    """Why a model cannot keep its state in a static cache; None where it can."""
    layers = DynamicCache(config=model.config).layers
    if not layers:
        return "its layers are not known before it runs"
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it has layers of the kind {type(layer).__name__}, which keep other state"
    return None


def static_cache(model: PreTrainedModel, capacity: int, rows: int | None = None) -> StaticCache:
    """An empty static cache for a model that `refuses_static` does not name a reason for."""
    return StaticCache(len(DynamicCache(config=model.config).layers), capacity, rows)
