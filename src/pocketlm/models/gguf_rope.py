"""Rotary scaling of a GGUF file, as the rope parameters that make transformers compute the same.

llama.cpp stores what Llama 3.1 does to the rotary frequencies as a table `rope_freqs.weight`: the
frequency i is divided by f_i, which is 1 for short wavelengths, s for long ones, and between

    1 / f_i = (1 - m_i) / s + m_i,   m_i = (L / λ_i - low) / (high - low),   λ_i = 2π θ^(2i/d),

with L the original context. transformers takes s, low, high and L. The table tells s and the line
m = A / λ - B; only L / low and L / high matter, so low is set to 1: high = 1 + 1 / B, L = A / B.
The result counts only where transformers' own function gives the table back.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TOLERANCE = 1e-5  # relative, of each frequency: the table and both ways to it are float32


def rope_parameters(factors_F: Tensor, config: PretrainedConfig) -> dict[str, Any] | None:
    """The parameters under which transformers divides its frequencies by a table.

    Args:
        factors_F: The table, one divisor for each frequency.
        config: Of the model, its rotary base stated and not scaled.

    Returns:
        Rope parameters; None where transformers cannot express the table.
    """
    plain: dict[str, Any] = {**config.rope_parameters, "rope_type": "default"}
    factors_F = factors_F.double()
    count = len(factors_F)
    if not bool(torch.isfinite(factors_F).all()) or not bool((factors_F > 0).all()):
        return None
    places_F = torch.arange(count, dtype=torch.float64) / count
    wavelengths_F = 2 * math.pi * float(plain["rope_theta"]) ** places_F
    unscaled = bool((factors_F == 1).all())
    guesses = [_guess(1.0, 4.0, 8192)] if unscaled else _guesses(factors_F, wavelengths_F)
    for guess in guesses:
        trial = copy.deepcopy(config)
        trial.rope_parameters = {**plain, "rope_type": "llama3", **guess}
        got_F, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
        asked_F = 2 * math.pi / wavelengths_F / factors_F
        if len(got_F) == count and torch.allclose(got_F.double(), asked_F, rtol=TOLERANCE, atol=0):
            return plain if unscaled else trial.rope_parameters
    return None


def _guesses(factors_F: Tensor, wavelengths_F: Tensor) -> list[dict[str, float]]:
    """Parameters to try: Llama 3.1's own, what the table says in round numbers, and as it is."""
    largest = float(factors_F.max())
    guesses = [_guess(largest, 4.0, 8192)]
    between_F = (factors_F > 1) & (factors_F < largest)
    if int(between_F.sum()) >= 2:
        shares = (1 / factors_F[between_F] - 1 / largest) / (1 - 1 / largest)
        inverse = 1 / wavelengths_F[between_F]
        line = torch.stack([inverse, -torch.ones_like(inverse)], dim=1)
        slope, offset = torch.linalg.lstsq(line, shares[:, None]).solution[:, 0].tolist()
        if slope > 0 and offset > 0:
            high, original = 1 + 1 / offset, slope / offset
            guesses += [_guess(largest, round(high, 2), round(original))]
            guesses += [_guess(largest, high, original)]
    return guesses


def _guess(factor: float, high: float, original: float) -> dict[str, float]:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
