"""CUDA graphs of whole prompts: what a prompt of some hundred tokens waits for is the host.

A graph serves all prompts of up to its size: they are padded on the right, where tokens are seen by
nobody before them and their keys are written over by what follows. It begins with an empty cache,
and is made for the second prompt of a size: the first alone would not pay for it.

Legend: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketlm.runtime.kernels.triton.kernel import replayed

if TYPE_CHECKING:
    from pocketlm.runtime.lean import LeanStep

STEP = 64  # sizes are multiples of it
MOST = 1024  # tokens of all rows; with more the host keeps ahead
WARM_UPS = 2  # runs before a capture: libraries allocate and compile in them


class PromptGraphs:
    """The graphs over one cache, whose memory for activations is one and the same."""

    def __init__(self) -> None:
        self._asked: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], _PromptGraph] = {}
        self._pool: Any = None  # torch's handle has no public type

    def logits(self, lean: LeanStep, ids_BT: Tensor) -> Tensor | None:
        """Logits [B, V] of each row's last id, overwritten by the next; None without a graph.

        Args:
            lean: Always the same; its cache holds a multiple of `STEP` positions.
            ids_BT: Without padding.

        Raises:
            RuntimeError: If it cannot be captured.
        """
        rows, tokens = ids_BT.shape
        size = -(-tokens // STEP) * STEP
        key = (rows, size)
        if rows * size > MOST:
            return None
        if key not in self._graphs:
            if key not in self._asked:
                self._asked.add(key)
                return None
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _PromptGraph(lean, rows, size, ids_BT.device, self._pool)
        return self._graphs[key].replay(ids_BT)


class _PromptGraph:
    def __init__(
        self, lean: LeanStep, rows: int, size: int, device: torch.device, pool: Any
    ) -> None:
        self._ids_BT = torch.zeros(rows, size, dtype=torch.long, device=device)
        self._begin_B = torch.arange(0, rows * size, size, device=device)
        self._last_B = self._begin_B.clone()
        self._graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        with replayed():
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    lean.prompt(self._ids_BT, 0, None, self._last_B)
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(self._graph, pool=pool):
                self._logits_BV = lean.prompt(self._ids_BT, 0, None, self._last_B)

    def replay(self, ids_BT: Tensor) -> Tensor:
        tokens = ids_BT.shape[1]
        self._ids_BT[:, :tokens] = ids_BT  # what an earlier prompt left behind them is not seen
        torch.add(self._begin_B, tokens - 1, out=self._last_B)
        self._graph.replay()
        return self._logits_BV
