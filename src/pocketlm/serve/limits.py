"""What the server takes at most, and how much of it this machine's memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocketlm.core.errors import ConfigError, ResourceError
from pocketlm.engine.machine import available_ram_bytes
from pocketlm.runtime.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONCURRENCY = (64, 32, 16, 8, 4, 2, 1)  # tried in this order
WANTED_POSITIONS = 4096  # fewer answers at once rather than shorter ones
MEMORY_SHARE = 0.5  # of what is free, for keys and values


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Attributes:
        concurrency: Answers written at once.
        positions: Tokens of a prompt and its answer together.
        queue: Requests that may wait.
        seconds: That one request may take, waiting included.
        body_bytes: Of a request.
        choices: Answers that one request may ask for.
    """

    concurrency: int
    positions: int
    queue: int = 128
    seconds: float = 600.0
    body_bytes: int = 4 << 20
    choices: int = 16


def fitting(
    model: PreTrainedModel, concurrency: int | None = None, context: int | None = None
) -> tuple[int, int]:
    """Answers at once and positions of each, so that keys and values fit in half the free memory.

    Args:
        model: From `load`.
        concurrency: Wanted; None: the most that leave room for 4096 positions each.
        context: Positions wanted; None: the model's, or as many as fit.

    Returns:
        Both.

    Raises:
        ConfigError: If the model has fewer positions than wanted.
        ResourceError: If what is wanted does not fit.
    """
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    if context is not None and context > own:
        raise ConfigError(
            f"the model has {own:,} positions.", where=f"--context {context}", remedy="Give fewer."
        )
    trial = Batch(model, 1)
    trial.join([0])
    each, wanted = trial.position_bytes(), context or min(own, WANTED_POSITIONS)
    if each == 0:  # no static cache: one row at a time, as long as it will be
        return 1, context or own
    room = _free_bytes(model.device) * MEMORY_SHARE / each
    for rows in CONCURRENCY if concurrency is None else (concurrency,):
        if rows * wanted <= room:
            return rows, context or min(own, int(room / rows))
    if context is None and concurrency is not None and room >= concurrency:
        return concurrency, int(room / concurrency)
    raise ResourceError(
        f"keys and values of {wanted:,} positions take {wanted * each / 1e9:.2g} GB an answer; "
        f"{_free_bytes(model.device) * MEMORY_SHARE / 1e9:.2g} GB are there for them.",
        where="serve",
        remedy="Give a smaller --context or --concurrency.",
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_ram_bytes()
