"""On-disk formats: names, bytes, encoding and configuration of each; no model, no transformers."""

from __future__ import annotations

from types import ModuleType

from pocketlm.core.errors import ConfigError, nearest


def format_for(name: str) -> ModuleType:
    """The module that writes and reads a format.

    Args:
        name: ``compressed-tensors``, ``pocketlm`` or ``dense``.

    Returns:
        A module with `names`, `encode`, `decode`, `config_section` and `stored_bytes`.

    Raises:
        ConfigError: If the format is unknown.
    """
    from pocketlm.formats import compressed_tensors, dense, pocketlm

    known = {module.NAME: module for module in (compressed_tensors, pocketlm, dense)}
    if name not in known:
        raise ConfigError(f"unknown format '{name}'.", remedy=nearest(name, known))
    return known[name]
