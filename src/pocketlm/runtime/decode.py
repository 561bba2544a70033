"""One token after another for some rows: prefill, then steps; on CUDA a step is one graph replay,
and so are prompts of a size that comes again (prompt_graphs.py).

Keys and values lie in a static cache that keeps every position. On CUDA a step (forward, choice of
the tokens, moving on) is captured once for each number of positions that attention reads (256,
512, …) and replayed; tokens feed the next step without passing the host. On a CPU the same step
runs eagerly. The forward is the model's own or, where its blocks are of the plain kind, a lean one
(lean.py; with few rows on a CPU native/step.py). What cannot be done so falls back, and the logger
says why, once.

Legend: B rows, T tokens, N capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketlm.runtime.lean import TOLERANCE, LeanStep, lean_steps
from pocketlm.runtime.prompt_graphs import WARM_UPS, PromptGraphs
from pocketlm.runtime.sampling import Choice, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocketlm.runtime.native.step import NativeStep

log = logging.getLogger("pocketlm.runtime")

CAPACITY_STEP = 256  # a cache has room for a multiple of it
PREFILL_CHUNK = 4096  # prompt tokens of one forward, of all rows: bounds the memory it takes
LEAST_CHUNK = 256  # of one row
TRIED_TOKENS = 64  # of a prompt, on which the lean forward is compared with the model's own
LEAN_PROMPTS = ("cuda",)  # devices that would wait for the host in the model's own forward


class Tokens:
    """The ids of one step on their way to the host."""

    def __init__(self, tokens_B: Tensor) -> None:
        self._event = None
        if tokens_B.device.type == "cuda":
            self._host_B = torch.empty(tokens_B.shape, dtype=tokens_B.dtype, pin_memory=True)
            self._host_B.copy_(tokens_B, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host_B = tokens_B.clone()

    def read(self) -> list[int]:
        """Waits for them, not for what was started later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host_B.tolist()


class Decoder:
    """Writes tokens with one model, for a fixed number of rows.

    Args:
        model: From `load`, or any causal language model of transformers, in eval mode.
        rows: B.
        sampling: How tokens are chosen.
        seed: For drawing.
        lean: Whether the lean step may stand in for the model's own forward.
        graphs: Whether steps may be captured, where the device is CUDA.

    Attributes:
        tokens_B: The newest token of each row.
        length: Positions that the cache holds, padding included.
        notes: What fell back, and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int = 1,
        sampling: Choice | None = None,
        seed: int = 0,
        *,
        lean: bool = True,
        graphs: bool = True,
    ) -> None:
        from pocketlm.models.static_cache import refuses_static

        self.model, self.rows = model, rows
        self.device = model.device
        self.sampling: Choice = sampling or Sampling()
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.notes: list[str] = []
        self._static_refused = refuses_static(model)
        if self._static_refused is not None:
            self._note(f"no static cache: {self._static_refused}.")
        self._graphs_on = graphs and self.device.type == "cuda" and self._static_refused is None
        self._lean_on = lean and self._static_refused is None
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.tokens_B = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        self._slot_at = -1
        self._pad_B = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._padded = False
        self._graphs: dict[tuple[int, int, bool, Choice], torch.cuda.CUDAGraph] = {}
        self._lean: LeanStep | NativeStep | None = None
        self._prompt_graphs = PromptGraphs() if self._graphs_on else None
        self._prompts_on = lean and self.device.type in LEAN_PROMPTS
        self._cache: Any = None
        self.length = 0

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be under way while its predecessor's tokens are read."""
        return self.device.type == "cuda"

    @property
    def loop(self) -> str:
        """How steps run, in words."""
        forward = "transformers' forward" if self._lean is None else self._lean.name
        cache = "a dynamic cache" if self._static_refused is not None else "a static cache"
        return f"{forward} over {cache}" + (", replayed as a CUDA graph" if self._graphs_on else "")

    def restart(self, sampling: Choice, seed: int) -> None:
        """Another way of choosing from here on; what the cache holds stays."""
        self.sampling = sampling
        self.generator.manual_seed(seed)

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions in all."""
        if self._static_refused is not None:
            return
        from pocketlm.models.static_cache import static_cache

        wanted = -(-positions // CAPACITY_STEP) * CAPACITY_STEP
        if self._cache is None:
            self._cache = static_cache(self.model, wanted)
        elif wanted > self._cache.capacity:
            self._cache.grow(max(wanted, 2 * self._cache.capacity))
            self._graphs.clear()
            self._prompt_graphs = self._prompt_graphs and PromptGraphs()
            self._lean = None

    def cut(self, length: int) -> bool:
        """Forgets all but the first positions; False where the cache cannot."""
        if self._static_refused is None:
            self.length = min(length, self.length)
            return True
        from pocketlm.models.runtime_model import cut_cache

        if self._cache is None or not cut_cache(self._cache, length):
            self._cache, self.length = None, 0
            return False
        self.length = length
        return True

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]], room: int = 0) -> Tokens:
        """Computes the prompts after what the cache holds, and chooses the first new tokens.

        Args:
            rows: Ids of each row; shorter ones are padded on the left, only where the cache is
                empty.
            room: Steps to come.

        Returns:
            The first new token of each row.
        """
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        self.reserve(self.length + longest + room)
        if self.length == 0:
            self._padded = any(pads)
            self._pad_B.copy_(torch.tensor(pads))
        ids_BT = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
        ids_BT = ids_BT.to(self.device)
        logits_BV = None
        chunk = max(LEAST_CHUNK, PREFILL_CHUNK // len(rows))
        for start in range(0, longest, chunk):
            logits_BV = self._prompt_logits(ids_BT[:, start : start + chunk])
        assert logits_BV is not None  # a prompt has a token
        self.tokens_B.copy_(self.sampling.draw(logits_BV, self.generator))
        return Tokens(self.tokens_B)

    @torch.inference_mode()
    def step(self) -> Tokens:
        """Computes the newest tokens and chooses the next; on CUDA without waiting for them."""
        self.reserve(self.length + 1)
        graph = self._graph() if self._graphs_on else None
        if graph is None:
            logits_BV = self._eager_step()
            self.tokens_B.copy_(self.sampling.draw(logits_BV, self.generator))
            return Tokens(self.tokens_B)
        if self._slot_at != self.length:
            self._slot_1.fill_(self.length)
        graph.replay()
        self.length += 1
        self._slot_at = self.length
        return Tokens(self.tokens_B)

    def _prompt_logits(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, V] of the last token after what the cache holds, lean where that may be."""
        if self._prompts_on and self._lean_on and self._lean is None:
            self._try_prompt(ids_BT[:, :TRIED_TOKENS])
        if not self._prompts_on or not isinstance(self._lean, LeanStep):
            return self._forward(ids_BT)
        logits_BV = self._replayed_prompt(self._lean, ids_BT)
        if logits_BV is None:
            logits_BV = self._lean.prompt(ids_BT, self.length, self._pads())
        self.length += ids_BT.shape[1]
        return logits_BV

    def _replayed_prompt(self, lean: LeanStep, ids_BT: Tensor) -> Tensor | None:
        """The same from a graph; None where there is none."""
        if self._prompt_graphs is None or self.length or self._padded:
            return None
        try:
            return self._prompt_graphs.logits(lean, ids_BT)
        except RuntimeError as error:
            self._prompt_graphs = None
            torch.cuda.synchronize()
            self._note(f"no CUDA graph of prompts: {str(error).splitlines()[0]}")
            return None

    def _forward(self, ids_BT: Tensor) -> Tensor:
        """The model's own forward after what the cache holds: logits [B, V] of the last token."""
        tokens = ids_BT.shape[1]
        inputs: dict[str, Any] = {}
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if self._padded:
            seen_N = torch.arange(self.length + tokens, device=self.device)
            inputs["attention_mask"] = (seen_N >= self._pad_B[:, None]).long()
            position_BT = seen_N[self.length :] - self._pad_B[:, None]
            inputs["position_ids"] = position_BT.clamp(min=0)
        if self._static_refused is None and self._cache is not None:
            self._cache.length = self.length
        out = self.model(ids_BT, use_cache=True, logits_to_keep=1, **inputs)
        if self._static_refused is not None:
            self._cache = out.past_key_values
        self.length += tokens
        return out.logits[:, -1]

    def _eager_step(self) -> Tensor:
        self._try_lean()
        if self._lean is None:
            return self._forward(self.tokens_B[:, None])
        logits_BV = self._lean.at(self.tokens_B, self.length, self._pads())
        self.length += 1
        return logits_BV

    def _try_lean(self) -> None:
        """Makes the lean step, and trusts it where it agrees with the model's own forward."""
        if not self._lean_on or self._lean is not None:
            return
        for lean in lean_steps(self.model, self._cache, self.rows):
            if isinstance(lean, str):
                self._note(lean)
                continue
            reason = self._distrust(lean)
            if reason is not None and lean.kernels is not None:
                self._note(f"attention without kernels of our own: {reason}.")
                lean.kernels = None
                reason = self._distrust(lean)
            if reason is None:
                self._lean = lean
                return
            self._note(f"{lean.name} is not used: {reason}.")
        self._lean_on = False

    def _try_prompt(self, ids_BT: Tensor) -> None:
        """Makes the lean step, and trusts it with prompts where it agrees on the first tokens."""
        truth_BV, held = self._forward(ids_BT), self.length - ids_BT.shape[1]
        self.reserve(self.length + 1)
        self._try_lean()
        self.length = held
        lean = self._lean
        if not isinstance(lean, LeanStep):
            return
        begun_B = self._pad_B < held + ids_BT.shape[1]  # of padding alone no logits are right
        half = ids_BT.shape[1] // 2

        def in_two() -> Tensor:
            """From what the cache holds, and then behind it: attention has a path for each."""
            if half:
                lean.prompt(ids_BT[:, :half], held, self._pads())
            return lean.prompt(ids_BT[:, half:], held + half, self._pads())[begun_B]

        reason = self._differs(truth_BV[begun_B], in_two)
        if reason is not None:
            self._prompts_on = False
            self._note(f"prompts run through transformers' forward: in the lean one {reason}.")

    def _distrust(self, lean: LeanStep | NativeStep) -> str | None:
        """Why a lean step may not stand in: it fails, or its logits differ; None where it may."""
        truth_BV = self._forward(self.tokens_B[:, None])
        self.length -= 1
        if not self._graphs_on or not isinstance(lean, LeanStep):
            return self._differs(
                truth_BV, lambda: lean.at(self.tokens_B, self.length, self._pads())
            )
        seen = self._cache.capacity
        with self._at_slot(seen):
            return self._differs(
                truth_BV, lambda: lean.at_slot(self.tokens_B, self._slot_1, seen, self._pad_B)
            )

    def _differs(self, truth_BV: Tensor, ours: Callable[[], Tensor]) -> str | None:
        """What is wrong with logits beside those of the model's own forward; None: nothing."""
        try:
            ours_BV = ours().float()
        except Exception as error:  # compilers raise of every kind
            return f"it fails here ({type(error).__name__}: {str(error).splitlines()[0]})"
        error = float((ours_BV - truth_BV.float()).norm() / truth_BV.float().norm())
        if not error < TOLERANCE[self.model.dtype]:
            return f"its logits are off by {error:.1e}"
        return None

    def _pads(self) -> Tensor | None:
        return self._pad_B if self._padded else None

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        """The graph that reads enough positions; captured where there is none yet."""
        seen = min(_next_power(self.length + 1), self._cache.capacity)
        key = (self.rows, seen, self._padded, self.sampling)
        found = self._graphs.get(key)
        if found is None:
            try:
                found = self._captured(seen)
            except RuntimeError as error:
                self._graphs_on = False
                torch.cuda.synchronize()
                self._note(f"no CUDA graph: {str(error).splitlines()[0]}")
                return None
            self._graphs[key] = found
        return found

    def _captured(self, seen: int) -> torch.cuda.CUDAGraph:
        self._try_lean()
        before_B, state = self.tokens_B.clone(), self.generator.get_state()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        side = torch.cuda.Stream(self.device)
        with self._at_slot(seen):
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._draw(self._logits_at_slot())
            torch.cuda.current_stream(self.device).wait_stream(side)
            self.generator.set_state(state)
            with torch.cuda.graph(graph):
                self.tokens_B.copy_(self._draw(self._logits_at_slot()))
                self._slot_1.add_(1)
        self.tokens_B.copy_(before_B)
        self._slot_at = -1
        return graph

    def _draw(self, logits_BV: Tensor) -> Tensor:
        greedy = isinstance(self.sampling, Sampling) and self.sampling.temperature == 0.0
        if greedy and isinstance(self._lean, LeanStep):
            return self._lean.likeliest(logits_BV)
        return self.sampling.draw(logits_BV, self.generator)

    @contextmanager
    def _at_slot(self, seen: int) -> Generator[None]:
        """Steps within write where `_slot_1` says, and attention reads `seen` positions."""
        self._slot_1.fill_(self.length)
        self._cache.slot, self._cache.seen = self._slot_1, seen
        try:
            yield
        finally:
            self._cache.slot = None

    def _logits_at_slot(self) -> Tensor:
        """Logits [B, V] with every place on the device: what a graph can hold."""
        seen = self._cache.seen
        if isinstance(self._lean, LeanStep):
            return self._lean.at_slot(self.tokens_B, self._slot_1, seen, self._pad_B)
        inputs: dict[str, Any] = {}
        position_B1 = self._slot_1.expand(self.rows, 1)
        if self._padded:
            columns_N = torch.arange(seen, device=self.device)
            inputs["attention_mask"] = columns_N >= self._pad_B[:, None]
            position_B1 = position_B1 - self._pad_B[:, None]
        if self._takes_positions:
            inputs["position_ids"] = position_B1
        out = self.model(
            self.tokens_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        return out.logits[:, -1]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
        _say_once(type(self.model).__name__, text)


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _next_power(count: int) -> int:
    """The next power of two, at least `CAPACITY_STEP`."""
    return max(CAPACITY_STEP, 1 << (count - 1).bit_length())


@lru_cache(maxsize=256)
def _say_once(model: str, text: str) -> None:
    log.info("%s: %s", model, text)
