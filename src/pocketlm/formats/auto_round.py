"""Files of AutoRound's own format: the layouts of GPTQ or AWQ under other words; read, not written.

``packing_format`` names the layout: ``auto_round`` alone is that of gptq_v2, one with ``gptq`` that
of gptq, one with ``awq`` that of awq. ``extra_config`` holds what differs, by name or pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pocketlm.core.errors import UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.formats import awq, gptq
from pocketlm.formats.layouts import Layout

NAME = "auto-round"


def scheme_of(
    section: Mapping[str, Any], module: str, *, ordered: bool
) -> tuple[QuantSpec, Layout]:
    """What the ``quantization_config`` of an AutoRound file says of one linear.

    Args:
        section: As AutoRound writes it.
        module: Module path.
        ordered: Whether the linear has a ``g_idx``.

    Raises:
        UnsupportedModel: If it is none that is read here.
    """
    packing = str(section.get("packing_format", "auto_round:auto_gptq"))
    words = {**section, **_override(section.get("extra_config") or {}, module)}
    if words.get("data_type", "int") != "int":
        raise UnsupportedModel(
            f"'{words['data_type']}' in AutoRound's own format is not read here.",
            where="quantization_config",
            remedy="Export it from AutoRound as llm_compressor.",
        )
    if "awq" in packing:
        return awq.scheme_of({**words, "version": awq.VERSION})
    first = "gptq" in packing and "gptqmodel" not in packing
    grid = {"checkpoint_format": "gptq" if first else "gptq_v2", "dynamic": {}}
    return gptq.scheme_of({**words, **grid}, module, ordered=ordered)


def _override(extra: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any]:
    if module in extra:
        return extra[module]
    for pattern, words in extra.items():
        try:
            if re.fullmatch(pattern, module):
                return words
        except re.error:
            continue  # a name, no pattern
    return {}
