"""From logits to the next token: greedy, or drawn from the nucleus at a temperature.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError


def next_token(
    logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """Chooses one token.

    Args:
        logits_V: Of the last position.
        temperature: 0 takes the most likely one; above, logits are divided by it and one is drawn.
        top_p: Only the likeliest tokens that together reach this probability may be drawn.
        generator: Source of randomness, on the CPU.

    Returns:
        The token's id.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    probability_V = torch.softmax(logits_V.float().cpu() / temperature, dim=-1)
    if top_p < 1.0:
        sorted_V, order_V = probability_V.sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        probability_V[order_V[before_V >= top_p]] = 0.0
    return int(torch.multinomial(probability_V, 1, generator=generator))


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuses values out of range.

    Raises:
        ConfigError: Naming the value.
    """
    if temperature < 0:
        raise ConfigError(f"{temperature} is below 0.", where="temperature")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{top_p} is not in (0, 1].", where="top_p")
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} is below 1.", where="max_new_tokens")
