"""On-disk formats: names, bytes, encoding and configuration of each; no model, no transformers."""

from __future__ import annotations

from typing import Any

from pocketlm.core.errors import ConfigError, nearest


def format_for(name: str) -> Any:
    """What writes and reads a format.

    Args:
        name: ``compressed-tensors``, ``pocketlm``, ``dense``, ``gptq``, ``gptq_v2``,
            ``awq``, ``mlx`` or ``onnx``.

    Returns:
        A module or object with `names`, `encode`, `decode`, `config_section` and `stored_bytes`.

    Raises:
        ConfigError: If the format is unknown.
    """
    from pocketlm.formats import compressed_tensors, dense, pocketlm
    from pocketlm.formats.awq import AWQ
    from pocketlm.formats.gptq import GPTQ, GPTQ_V2
    from pocketlm.formats.mlx import MLX
    from pocketlm.formats.onnx import ONNX

    formats = (compressed_tensors, pocketlm, dense, GPTQ, GPTQ_V2, AWQ, MLX, ONNX)
    known = {each.NAME: each for each in formats}
    if name not in known:
        raise ConfigError(f"unknown format '{name}'.", remedy=nearest(name, known))
    return known[name]
