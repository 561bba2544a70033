"""Scales of a quantized cache in compressed-tensors: carried over, not applied.

``kv_cache_scheme`` of config.json says how an engine rounds keys and values; static scales lie
beside the attention ``a`` of a block as ``a.k_scale`` and ``a.v_scale``. They change how an engine
runs the model, not its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ROLES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
KEY = "kv_cache_scheme"


def scheme_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the cache is rounded, in the words of the file; None where it is not.

    Args:
        config: config.json.
    """
    section = config.get("quantization_config")
    return section.get(KEY) or None if isinstance(section, dict) else None


def scales(names: Iterable[str]) -> list[str]:
    """Those of some tensors that belong to a cache."""
    return [name for name in names if name.rpartition(".")[2] in ROLES]
