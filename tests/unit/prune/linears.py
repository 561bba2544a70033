"""Inputs, weights and statistics of small linears."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import GradientSize, Hessian
from pocketlm.prune.entropy import Entropy
from pocketlm.prune.moments import Moments


def inputs(tokens: int = 200, columns: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator)
    x_TI = torch.randn(tokens, columns, generator=generator) @ mixed
    x_TI = x_TI + torch.randn(columns, generator=generator)
    return x_TI * torch.randn(columns, generator=generator).exp()


def statistics(
    x_TI: torch.Tensor, device: str = "cpu", gradient_OI: torch.Tensor | None = None
) -> Statistics:
    stats = [kind(x_TI.shape[1], device) for kind in (Hessian, Moments, Entropy)]
    for stat in stats:
        stat.add(x_TI.to(device))
    if gradient_OI is None:
        return Statistics(*stats)
    return Statistics(*stats, GradientSize(gradient_OI.abs().to(device)))


def weight(rows: int = 12, columns: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class SumOfLinears:
    """A BlockTask: a block that adds up what its linears give for one input, of the same width."""

    def __init__(self, weights: Mapping[str, Tensor], x_BTI: Tensor) -> None:
        self.states: Mapping[str, LinearState] = {n: state_of(w) for n, w in weights.items()}
        self.batches, self.device, self._x_BTI = len(x_BTI), x_BTI.device, x_BTI
        self._weights = weights

    def inputs(self, batch: int) -> Tensor:
        return self._x_BTI[batch : batch + 1]

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        mixed = [(self.inputs(batch) @ w.T).mean(-1, keepdim=True) for w in weights.values()]
        return torch.cat(mixed, dim=-1)

    def targets(self, batch: int) -> Tensor:
        return self.forward(self._weights, batch)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def report(self, done: int, total: int, loss: float) -> None:
        pass


def state_of(weight_OI: torch.Tensor) -> LinearState:
    return LinearState("x", weight_OI, None, torch.float16)
