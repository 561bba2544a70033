"""On-disk formats: names, bytes, encoding and configuration of each; no model, no transformers."""

from __future__ import annotations

from types import ModuleType

from pocketlm.core.errors import ConfigError, nearest


def format_for(name: str) -> ModuleType:
    """The module that writes and reads a format.

    Args:
        name: ``compressed-tensors`` or ``pocketlm``.

    Returns:
        A module with `names`, `encode`, `decode`, `config_section`, `stored_bytes` and `check`.

    Raises:
        ConfigError: If the format is unknown.
    """
    from pocketlm.formats import compressed_tensors, pocketlm

    known = {module.NAME: module for module in (compressed_tensors, pocketlm)}
    if name not in known:
        raise ConfigError(f"unknown format '{name}'.", remedy=nearest(name, known))
    return known[name]
