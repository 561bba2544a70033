"""Linears by kind: the same place in every block, all experts of a layer as one."""

from __future__ import annotations

import re

_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


def kind_of(name: str) -> tuple[str, int]:
    """What a linear is, and in which block.

    Args:
        name: Module path, such as ``model.layers.3.mlp.experts.7.up_proj``.

    Returns:
        ``mlp.experts.*.up_proj`` and 3; outside of blocks the path and 0.
    """
    match = _NUMBERED.match(name)
    if match is None:
        return name, 0
    return re.sub(r"\.\d+\.", ".*.", match[3]), int(match[2])
