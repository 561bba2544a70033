"""MLX: what mlx-lm loads on Apple machines, in its affine mode; written, not read.

``quantization`` of config.json holds the usual grid, and by module path those that differ. A linear
is quantized where the file holds its ``scales``. The tensors are in `layouts.mlx_packed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec
from pocketlm.formats.integer_format import IntegerFormat, Shape
from pocketlm.formats.layouts import mlx_packed

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def _refuses(spec: QuantSpec, shape: Shape) -> str | None:
    if spec.bits not in BITS:
        return f"has {', '.join(map(str, BITS))} bits, not {spec.bits}"
    if spec.group_size not in GROUPS:
        return f"has groups of 32, 64 or 128, not {spec.group_size or 'whole rows'}"
    return None


def _section(
    specs: Mapping[str, QuantSpec], ignored: Sequence[str], permuted: Sequence[str]
) -> dict[str, Any]:
    if permuted:
        raise ConfigError("mlx has no activation order.", where=permuted[0], remedy="Write dense.")
    usual = Counter((spec.bits, spec.group_size) for spec in specs.values()).most_common(1)[0][0]
    others = {
        module: {"bits": spec.bits, "group_size": spec.group_size}
        for module, spec in specs.items()
        if (spec.bits, spec.group_size) != usual
    }
    return {"bits": usual[0], "group_size": usual[1], "mode": "affine", **others}


MLX = IntegerFormat("mlx", mlx_packed, _refuses, _section)
