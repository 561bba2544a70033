"""What becomes an ONNX file: integers in blocks that MatMulNBits takes, as a directory before it.

The directory is in the layout of Microsoft Olive (`layouts.olive_packed`), which the model builder
of ONNX Runtime GenAI reads and whose bytes it hands on; `engine/export_onnx.py` runs it. Of the
layouts that it reads this one alone holds zero points of an odd number of groups, and scales as
they are: from GPTQ it decodes and rounds again. Written, not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec
from pocketlm.formats.integer_format import IntegerFormat, Shape
from pocketlm.formats.layouts import olive_packed

GENAI_CONFIG = "genai_config.json"  # of a directory that the builder made
BITS = (2, 4, 8)
SMALLEST_BLOCK = 16


def _refuses(spec: QuantSpec, shape: Shape) -> str | None:
    if spec.bits not in BITS:
        return f"has {', '.join(map(str, BITS))} bits, not {spec.bits}"
    block = spec.group_size or shape[1]
    if block < SMALLEST_BLOCK or block & (block - 1):
        return f"has groups of a power of two from {SMALLEST_BLOCK} on, not {block}"
    return None


def _section(
    specs: Mapping[str, QuantSpec], ignored: Sequence[str], permuted: Sequence[str]
) -> dict[str, Any]:
    if permuted:
        raise ConfigError("onnx has no activation order.", where=permuted[0], remedy="Write dense.")
    usual = Counter(specs.values()).most_common(1)[0][0]
    others = {module: _words(spec) for module, spec in specs.items() if spec != usual}
    return {
        "quant_method": "olive",
        **_words(usual),
        "symmetric": usual.symmetric,
        **({"overrides": others} if others else {}),
    }


def _words(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1}


ONNX = IntegerFormat("onnx", olive_packed, _refuses, _section)
