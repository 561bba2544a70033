"""All windows go through a model block by block: one block's weights are in memory at a time.

The activations of all windows are held meanwhile, in RAM up to a budget, else in an unnamed
temporary file that is read and written in place (not mapped: mapped pages are resident memory).

Legend: N windows, T tokens of a window, D hidden width, B windows of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from pocketlm.core.views import ModelView

RAM_BUDGET_BYTES = 2 << 30
BATCH_TOKENS = 4096  # enough to keep a matrix product busy


class HiddenStates:
    """Activations [N, T, D] of one model, written and read by windows.

    Args:
        shape: (N, T, D).
        dtype: Of the activations.
        ram_budget_bytes: Up to this size in RAM, above it in a temporary file.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, ram_budget_bytes: int
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._window_bytes = prod(shape[1:]) * dtype.itemsize
        self._ram: Tensor | None = None
        self._file = None
        if self._window_bytes * shape[0] <= ram_budget_bytes:
            self._ram = torch.empty(shape, dtype=dtype)
        else:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it

    def write(self, start: int, hidden_BTD: Tensor) -> None:
        """Stores the windows from `start` on."""
        if self._ram is not None:
            self._ram[start : start + len(hidden_BTD)] = hidden_BTD
            return
        assert self._file is not None
        host = hidden_BTD.to("cpu", self.dtype).contiguous()
        self._file.seek(start * self._window_bytes)
        rest = host.view(torch.uint8).reshape(-1).numpy().data
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, start: int, stop: int) -> Tensor:
        """The windows from `start` to `stop`, on the CPU; not to be written to."""
        if self._ram is not None:
            return self._ram[start:stop]
        assert self._file is not None
        host_BTD = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self._file.seek(start * self._window_bytes)
        rest = host_BTD.view(torch.uint8).reshape(-1).numpy().data
        while rest:
            rest = rest[self._file.readinto(rest) :]
        return host_BTD

    def close(self) -> None:
        """Frees the memory or the file."""
        self._ram = None
        if self._file is not None:
            self._file.close()


def batches(windows: int, seq_len: int) -> list[tuple[int, int]]:
    """Start and stop of each batch, of about `BATCH_TOKENS` tokens."""
    step = max(1, BATCH_TOKENS // seq_len)
    return [(start, min(start + step, windows)) for start in range(0, windows, step)]


def steps(model: ModelView, windows: int, seq_len: int) -> int:
    """How often `stream` calls `on_step`."""
    return len(batches(windows, seq_len)) * (len(model.block_paths) + 2)


@torch.no_grad()
def stream(
    model: ModelView,
    tokens_NT: Tensor,
    on_step: Callable[[], None],
    ram_budget_bytes: int = RAM_BUDGET_BYTES,
) -> HiddenStates:
    """What the head reads, for every window.

    Args:
        model: Any model.
        tokens_NT: int64 ids.
        on_step: Called after each batch of each block.
        ram_budget_bytes: See `HiddenStates`.

    Returns:
        The finished activations; the caller closes them.
    """
    parts = batches(*tokens_NT.shape)
    states: HiddenStates | None = None
    calls = []
    for start, stop in parts:
        hidden_BTD, call = model.begin(tokens_NT[start:stop].to(model.device))
        if states is None:
            shape = (tokens_NT.shape[0], tokens_NT.shape[1], hidden_BTD.shape[-1])
            states = HiddenStates(shape, hidden_BTD.dtype, ram_budget_bytes)
        states.write(start, hidden_BTD)
        calls.append(call)
        on_step()
    assert states is not None, "windows are never empty"
    for index in range(len(model.block_paths)):
        with model.block(index) as block:
            for (start, stop), call in zip(parts, calls, strict=True):
                hidden_BTD = states.read(start, stop).to(model.device)
                states.write(start, block.forward(hidden_BTD, call))
                on_step()
    for start, stop in parts:
        states.write(start, model.finish(states.read(start, stop).to(model.device)))
        on_step()
    return states
