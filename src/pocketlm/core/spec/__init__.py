"""What to make: number formats and recipes, as frozen, validated values with a JSON round trip.

The *how* (scales, codes) is a method's business and the *where* (bits on disk) a format's.
"""

from pocketlm.core.spec.activations import ActivationSpec
from pocketlm.core.spec.numbers import (
    DOUBLE_BLOCK,
    GGUF_FALLBACKS,
    GGUF_TYPES,
    GROUP_SIZES,
    SUB_SCALE_BITS,
    SUPER_BLOCK,
    NumberType,
    QuantSpec,
    ScaleType,
)
from pocketlm.core.spec.recipe import Recipe, StepSpec, matches
from pocketlm.core.spec.schemes import INPUTS, SCHEMES, parse_inputs, parse_scheme
from pocketlm.core.spec.strict import Strict

__all__ = [
    "DOUBLE_BLOCK", "GGUF_FALLBACKS", "GGUF_TYPES", "GROUP_SIZES", "INPUTS", "SCHEMES",
    "SUB_SCALE_BITS", "SUPER_BLOCK", "ActivationSpec", "NumberType", "QuantSpec", "Recipe",
    "ScaleType", "StepSpec", "Strict", "matches", "parse_inputs", "parse_scheme",
]  # fmt: skip
