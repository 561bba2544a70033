"""Schemes by name, such as ``W4A16`` or ``NVFP4``: a number format, and how inputs are rounded."""

from __future__ import annotations

from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec.activations import ActivationSpec
from pocketlm.core.spec.numbers import GGUF_TYPES, NumberType, QuantSpec, ScaleType


def _schemes() -> dict[str, QuantSpec]:
    def float8(group_rows: int | None, group_size: int | None) -> QuantSpec:
        return QuantSpec(bits=8, type="float", group_rows=group_rows, group_size=group_size)

    def micro(bits: int, group_size: int, scale: ScaleType) -> QuantSpec:
        return QuantSpec(bits=bits, type="float", group_size=group_size, scale=scale)

    def table(kind: NumberType, scale: ScaleType, bits: int = 4) -> QuantSpec:
        return QuantSpec(bits=bits, type=kind, group_size=64, scale=scale)

    return {
        **{f"W{bits}A16": QuantSpec(bits=bits, group_size=128) for bits in range(2, 9)},
        "W8A8": QuantSpec(bits=8, group_size=None),
        "W8A8_STATIC": QuantSpec(bits=8, group_size=None),
        "W4A8": QuantSpec(bits=4, group_size=128),
        "LLM_INT8": QuantSpec(bits=8, group_size=None),
        "FP8": float8(1, None),
        "FP8_DYNAMIC": float8(1, None),
        "FP8_TENSOR": float8(None, None),
        "FP8_CHANNEL": float8(1, None),
        "FP8_BLOCK": float8(128, 128),
        "MXFP4": micro(4, 32, "e8m0"),
        "MXFP8": micro(8, 32, "e8m0"),
        "NVFP4": micro(4, 16, "e4m3"),
        "NF2": table("nf", "float", 2),
        "NF3": table("nf", "float", 3),
        "NF4": table("nf", "float"),
        "NF4_DQ": table("nf", "dynamic8"),
        "FP4": table("bnb_fp", "float"),
        "FP4_DQ": table("bnb_fp", "dynamic8"),
    }


SCHEMES = _schemes() | GGUF_TYPES

# How the inputs are rounded, of schemes that round them; a name ending in A16 is the weights alone.
INPUTS = {
    "W8A8": ActivationSpec(),
    "W8A8_STATIC": ActivationSpec(granularity="tensor", dynamic=False),
    "W4A8": ActivationSpec(),
    "LLM_INT8": ActivationSpec(outliers=6.0),
    "FP8": ActivationSpec(type="float", granularity="tensor", dynamic=False),
    "FP8_DYNAMIC": ActivationSpec(type="float"),
    "FP8_BLOCK": ActivationSpec(type="float", granularity="group", group_size=128),
}


def parse_scheme(name: str) -> QuantSpec:
    """The number format of the weights that a scheme's name stands for.

    ``W4A16`` is symmetric in groups of 128; formats that are no integers may end in ``A16``.

    Raises:
        ConfigError: If the name is no known scheme.
    """
    plain = name.upper()
    if plain not in SCHEMES and not plain.startswith("W"):
        plain = plain.removesuffix("A16")
    if plain not in SCHEMES:
        raise ConfigError(
            f"unknown scheme '{name}'.", where="--scheme", remedy=nearest(name, SCHEMES)
        )
    return SCHEMES[plain]


def parse_inputs(name: str) -> ActivationSpec | None:
    """How inputs are rounded in a scheme, such as ``W8A8``; None where they are not.

    Raises:
        ConfigError: If the name is no known scheme.
    """
    parse_scheme(name)
    return INPUTS.get(name.upper())
