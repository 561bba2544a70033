"""Where a scale can move between neighbours: proposed by shape and path, accepted by trial.

norm → linears:    norm(x) w  →  norm(x) w/s,  with the readers' columns times s
linear → linear:   rows of the producer over s, columns of the reader times s (values through
                   grouped heads, up → down)

A trial runs the block in float64 with and without the scale; the fold is accepted where the outputs
agree to 1e-9. Weights stay as they are in memory: linears are multiplied piece by piece in float64.
Proposals that only fit a slice of a fused producer are not made.
Legend: I input columns, O output rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from pocketlm.core.views import Fold
from pocketlm.models.call import BlockCall, first_tensor
from pocketlm.models.linear import is_linear, linear_shape
from pocketlm.models.observe import Observation

TOLERANCE = 1e-9  # relative; float64 leaves about 1e-14
PIECE_ELEMENTS = 4 << 20  # of a weight in float64 at a time
LARGEST_OTHER_BYTES = 256 << 20  # of parameters that are not linear, in float64
NARROW = (torch.float32, torch.float16, torch.bfloat16)
TO_DOUBLE = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class InFloat64(TorchFunctionMode):
    """Turns every cast to a narrower float into one to float64: norms often compute in float32."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the function with wide dtypes."""
        if func in TO_DOUBLE:
            return args[0].double()
        wide_args = tuple(torch.float64 if _is_narrow(arg) else arg for arg in args)
        wide = {k: torch.float64 if _is_narrow(v) else v for k, v in (kwargs or {}).items()}
        return func(*wide_args, **wide)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW


def widen(value: Any) -> Any:
    """Floating tensors in float64, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(widen(item) for item in value)
    if type(value) is dict:
        return {key: widen(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Trial:
    """Scales to apply during one run, by path relative to the block."""

    columns: Mapping[str, Tensor]  # a linear's input is multiplied
    rows: Mapping[str, Tensor]  # a linear's output is divided
    norm: tuple[str, str, Tensor] | None = None  # path, form, divisor


class FoldProbe:
    """Tries folds on one loaded block.

    Args:
        block: With its weights.
        hidden_BTD: An input of a few tokens.
        call: What else it is called with.
        head_dim: Width of an attention head.
    """

    def __init__(
        self, block: nn.Module, hidden_BTD: Tensor, call: BlockCall, head_dim: int
    ) -> None:
        self._block, self._head_dim = block, head_dim
        self._hidden = hidden_BTD.double()
        self._call = BlockCall(widen(call.args), widen(call.kwargs), call.by_name)
        self._linears = {path: m for path, m in block.named_modules() if is_linear(m)}
        self._generator = torch.Generator().manual_seed(0)
        self._expected: Tensor | None = None

    def folds(self, seen: Observation) -> list[Fold | None]:
        """The best fold of each group; one expert that tokens reach speaks for all."""
        verdicts: dict[Any, Fold | None] = {}
        found = []
        for index, group in enumerate(seen.groups):
            pattern = tuple(_pattern(path) for path in group)
            known = verdicts.get(pattern)
            if pattern not in verdicts or (known is not None and known.error is None):
                verdicts[pattern] = self._best(seen, index)
            found.append(_like(verdicts[pattern], group[0]))
        return found

    def _best(self, seen: Observation, index: int) -> Fold | None:
        group, producer = seen.groups[index], seen.producers[index]
        columns = linear_shape(self._linears[group[0]])[1]
        tried: list[Fold] = []
        if producer is not None and self._is_norm(producer, columns):
            scale_I = self._draw(columns)
            readers = dict.fromkeys(group, scale_I)
            for form in ("weight", "one_plus_weight"):
                trial = Trial(readers, {}, (producer, form, scale_I))
                tried.append(self._try(producer, form, trial))
                if tried[-1].accepted:
                    return tried[-1]
        for path in self._candidates(seen, index, columns):
            tried.append(self._try_linear(path, group, columns))
            if tried[-1].accepted:
                return tried[-1]
        return min(
            tried, key=lambda fold: float("inf") if fold.error is None else fold.error, default=None
        )

    def _is_norm(self, path: str, columns: int) -> bool:
        own = dict(self._block.get_submodule(path).named_parameters(recurse=False))
        return "weight" in own and own["weight"].shape == (columns,)

    def _candidates(self, seen: Observation, index: int, columns: int) -> Iterator[str]:
        """Linears beside this group that ran before it and whose width divides its columns."""
        parent = seen.groups[index][0].rpartition(".")[0]
        for group in reversed(seen.groups[:index]):
            for path in reversed(group):
                rows = linear_shape(self._linears[path])[0]
                if path.rpartition(".")[0] == parent and rows <= columns and columns % rows == 0:
                    yield path

    def _try_linear(self, producer: str, readers: list[str], columns: int) -> Fold:
        rows = linear_shape(self._linears[producer])[0]
        scale_O = self._draw(rows)
        shared, width = 1, 1
        if rows < columns:  # each value head serves several query heads
            if rows % self._head_dim:
                return Fold(
                    producer, "linear", False, None, "its rows are no whole number of heads"
                )
            shared, width = columns // rows, self._head_dim
        scale_I = spread(scale_O, shared, width)
        trial = Trial(dict.fromkeys(readers, scale_I), {producer: scale_O})
        return replace(self._try(producer, "linear", trial), shared=shared, width=width)

    def _draw(self, count: int) -> Tensor:
        scale = torch.exp2(torch.rand(count, generator=self._generator, dtype=torch.float64) - 0.5)
        return scale.to(self._hidden.device)

    def _try(self, producer: str, form: str, trial: Trial) -> Fold:
        others = sum(
            p.numel() for path, m in self._block.named_modules() if path not in self._linears
            for p in m.parameters(recurse=False)
        )  # fmt: skip
        if others * 8 > LARGEST_OTHER_BYTES:
            return Fold(producer, form, False, None, "the block is too large to try it in float64")
        try:
            if self._expected is None:
                self._expected = self._run(Trial({}, {}))
            got = self._run(trial)
        except (RuntimeError, TypeError, ValueError) as failure:
            return Fold(producer, form, False, None, f"the trial did not run ({failure})")
        error = self._difference(got)
        if not math.isfinite(error):
            return Fold(producer, form, False, None, "the block's output is zero or not finite")
        accepted = error < TOLERANCE
        of_expert = _pattern(producer) != producer
        if accepted and of_expert and self._is_idle(trial):
            return Fold(producer, form, False, None, "no token of the trial reaches it")
        reason = None if accepted else "the block's output changes"
        return Fold(producer, form, accepted, error, reason)

    def _is_idle(self, trial: Trial) -> bool:
        """Whether half a fold changes nothing: else any trial would pass."""
        return self._difference(self._run(Trial(trial.columns, {}))) < TOLERANCE

    def _difference(self, output: Tensor) -> float:
        assert self._expected is not None
        return float((output - self._expected).norm() / self._expected.norm())

    def _run(self, trial: Trial) -> Tensor:
        with torch.no_grad(), self._wide_parameters(trial), self._wide_linears(trial), InFloat64():
            return first_tensor(self._call.run(self._block, self._hidden)).double()

    @contextmanager
    def _wide_parameters(self, trial: Trial) -> Iterator[None]:
        """Parameters and buffers that are not a linear's in float64; a norm's over the scale."""
        kept: list[tuple[dict[str, Any], str, Any]] = []
        for path, module in self._block.named_modules():
            if path in self._linears:
                continue
            for store in (module._parameters, module._buffers):
                for name, value in list(store.items()):
                    if value is not None and value.is_floating_point():
                        kept.append((store, name, value))
                        store[name] = _scaled_norm(value.detach().double(), path, name, trial)
        try:
            yield
        finally:
            for store, name, value in kept:
                store[name] = value

    @contextmanager
    def _wide_linears(self, trial: Trial) -> Iterator[None]:
        for path, module in self._linears.items():
            module.forward = _wide_linear(module, trial.columns.get(path), trial.rows.get(path))
        try:
            yield
        finally:
            for module in self._linears.values():
                del module.forward


def _scaled_norm(value: Tensor, path: str, name: str, trial: Trial) -> Any:
    if trial.norm is not None and trial.norm[0] == path:
        _, form, divisor = trial.norm
        if name == "weight" and form == "one_plus_weight":
            value = (1 + value) / divisor - 1
        elif name in ("weight", "bias"):
            value = value / divisor
    return nn.Parameter(value, requires_grad=False)


def _wide_linear(
    module: nn.Module, columns: Tensor | None, rows: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A linear in float64, its input times one scale, its output over another."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight_OI = weight.T if isinstance(module, Conv1D) else weight
    step = max(1, PIECE_ELEMENTS // weight_OI.shape[1])

    def forward(x: Tensor) -> Tensor:
        x = x.double() if columns is None else x.double() * columns
        parts = [x @ weight_OI[i : i + step].double().T for i in range(0, weight_OI.shape[0], step)]
        out = torch.cat(parts, dim=-1)
        if isinstance(bias, Tensor):
            out = out + bias.double()
        return out if rows is None else out / rows

    return forward


def _pattern(path: str) -> str:
    """A path with the index of its expert left open."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _like(fold: Fold | None, path: str) -> Fold | None:
    """The verdict on one expert, said of the expert that `path` is in."""
    if fold is None or _pattern(path) == path:
        return fold
    index = re.search(r"\.\d+\.", path)
    assert index is not None
    producer = re.sub(r"\.\d+\.", index[0], fold.producer)
    return replace(fold, producer=producer)


def spread(scale_O: Tensor, shared: int, width: int) -> Tensor:
    """The readers' scale [I] of a producer's [O]: each `width` rows serve `shared` times."""
    return scale_O.view(-1, width).repeat_interleave(shared, dim=0).reshape(-1)


def gather(scale_I: Tensor, shared: int, width: int) -> Tensor:
    """The producer's scale [O] of a readers' [I]: the geometric mean where rows are shared."""
    return scale_I.log().view(-1, shared, width).mean(1).exp().reshape(-1)
