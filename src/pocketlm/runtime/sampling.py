"""From logits to the next tokens, on the device and without asking it: greedy, or drawn.

A token is drawn with the exponential trick: argmax p / e with e ~ Exp(1) has the distribution p.
It needs no sum on the host, so that a CUDA graph can hold it.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError


class Choice(Protocol):
    """Whatever takes the logits of a step: it chooses, or keeps them for one who does."""

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next token of each row [B]."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it and one is
            drawn.
        top_k: Only so many of the likeliest tokens may be drawn; 0 for all.
        top_p: Only the likeliest tokens that together reach this probability may be drawn.

    Raises:
        ConfigError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"{self.temperature} is below 0.", where="temperature")
        if self.top_k < 0:
            raise ConfigError(f"{self.top_k} is below 0.", where="top_k")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{self.top_p} is not in (0, 1].", where="top_p")

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """Chooses a token for each row.

        Args:
            logits_BV: Of the last position.
            generator: Source of randomness, on the logits' device.

        Returns:
            Ids [B].
        """
        if self.temperature == 0.0:
            return logits_BV.argmax(-1)
        p_BV = torch.softmax(logits_BV.float() / self.temperature, dim=-1)
        if self.top_k or self.top_p < 1.0:
            p_BV = self._likeliest(p_BV)
        noise_BV = torch.empty_like(p_BV).exponential_(generator=generator)
        return (p_BV / noise_BV).argmax(-1)

    def _likeliest(self, p_BV: Tensor) -> Tensor:
        """The probabilities with those zeroed that may not be drawn."""
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True)
        if self.top_k:
            sorted_BV[:, self.top_k :] = 0.0
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        total_B1 = sorted_BV.sum(-1, keepdim=True)  # below 1 where top-k has cut
        sorted_BV = sorted_BV.where(before_BV < self.top_p * total_B1, 0.0)
        return torch.zeros_like(p_BV).scatter_(-1, order_BV, sorted_BV)
