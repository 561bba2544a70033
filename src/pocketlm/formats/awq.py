"""AWQ files of the version ``gemm``: 4 bits with zero points, one grid for all linears.

What AutoAWQ writes and vLLM loads by itself. A symmetric grid is held with its zero at 8. Linears
that are kept are named under ``modules_to_not_convert``, which readers compare as parts of a path.
The tensors are in `layouts.awq_packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.formats.integer_format import IntegerFormat, Shape
from pocketlm.formats.layouts import Layout, awq_packed

VERSION = "gemm"


def _refuses(spec: QuantSpec, shape: Shape) -> str | None:
    if spec.bits != awq_packed.BITS:
        return f"has 4 bits, not {spec.bits}"
    if shape[0] % 8:
        return f"packs eight outputs into a word; this weight has {shape[0]}"
    return None


def _section(
    specs: Mapping[str, QuantSpec], ignored: Sequence[str], permuted: Sequence[str]
) -> dict[str, Any]:
    if permuted:
        raise ConfigError(
            "awq has no activation order.", where=permuted[0], remedy="Write gptq or dense."
        )
    sizes = {spec.group_size for spec in specs.values()}
    if len(sizes) > 1:
        listed = ", ".join(str(size or "whole rows") for size in sizes)
        raise ConfigError(
            f"awq has one group size for all linears, not {listed}.",
            where="quantization_config",
            remedy="Write gptq or compressed-tensors, which hold several.",
        )
    for kept in ignored:
        hidden = next((module for module in specs if kept in module), None)
        if hidden is not None:
            raise ConfigError(
                f"'{kept}' is kept, and readers of awq would take '{hidden}' for it.",
                where="modules_to_not_convert",
                remedy="Write gptq or compressed-tensors.",
            )
    return {
        "quant_method": "awq",
        "bits": awq_packed.BITS,
        "group_size": sizes.pop() or -1,
        "zero_point": True,
        "version": VERSION,
        "modules_to_not_convert": list(ignored),
    }


AWQ = IntegerFormat("awq", awq_packed, _refuses, _section)


def scheme_of(section: Mapping[str, Any]) -> tuple[QuantSpec, Layout]:
    """What the ``quantization_config`` of an AWQ file says of its linears.

    Args:
        section: As any tool writes it.

    Raises:
        UnsupportedModel: If it is none that is read here.
    """
    version = str(section.get("version", VERSION)).lower()
    bits = section.get("bits", section.get("w_bit"))
    if version != VERSION or bits != awq_packed.BITS:
        raise UnsupportedModel(
            f"an AWQ file of version '{version}' and {bits} bits is not read here.",
            where="quantization_config",
            remedy=f"Read is the version '{VERSION}' of {awq_packed.BITS} bits.",
        )
    group_size = section.get("group_size", section.get("q_group_size", 128))
    data = {
        "bits": bits,
        "group_size": None if group_size in (None, -1) else group_size,
        "symmetric": False,
    }
    try:
        return QuantSpec.parse(data, where="quantization_config"), awq_packed
    except ConfigError as error:
        raise UnsupportedModel(error.what, where="quantization_config") from None
