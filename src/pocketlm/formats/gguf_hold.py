"""Which type of a GGUF file holds a weight's codes as they are."""

from __future__ import annotations

from pocketlm.core.spec import GGUF_TYPES, SUPER_BLOCK, QuantSpec
from pocketlm.core.stored import DenseSpec, WeightSpec
from pocketlm.formats.gguf_types import MXFP4, SPECS, block_weights

_OWN = (*GGUF_TYPES.items(), ("MXFP4", MXFP4))
_FLOAT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def holding_type(spec: WeightSpec, columns: int) -> str | None:
    """The smallest type that holds every code of a number format.

    Scales are float16 in all of them: others are rounded to that. A scale of more than 32 columns
    is repeated. Zero points of 2 and 3 bits vanish in wider codes, those of 6 and 7 bits too; those
    of 4 and 5 bits become minima, rounded to float16.

    Args:
        spec: The form of the weight.
        columns: I.

    Returns:
        The type; None where none does, such as for sparse weights, factors, FP8 and NF4.
    """
    if isinstance(spec, DenseSpec):
        return _FLOAT_TYPES.get(spec.dtype)
    if not isinstance(spec, QuantSpec):
        return None
    kind = next((name for name, own in _OWN if own == spec), None)
    if kind is None and spec.type == "int":
        kind = _of_integers(spec, columns)
    return kind if kind is not None and columns % block_weights(kind) == 0 else None


def _of_integers(spec: QuantSpec, columns: int) -> str | None:
    size = spec.group_size or columns
    if size % 32:
        return None
    if not spec.symmetric:
        return {2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 7: "Q8_0"}.get(spec.bits)
    if spec.bits == 2 and size % SUPER_BLOCK == 0:
        return "TQ2_0"
    return "Q4_0" if spec.bits <= 4 else "Q5_0" if spec.bits == 5 else "Q8_0"


def native(spec: QuantSpec) -> QuantSpec:
    """The number format that a type has by itself, for one that it would only hold.

    Integers in wide groups take no fewer bytes in a file than in groups of 32; zero points become
    minima that are free.
    """
    if spec.type != "int" or spec.group_rows != 1:
        return spec
    if not spec.symmetric and spec.bits in (4, 5):
        return SPECS[f"Q{spec.bits}_1"]
    if spec.symmetric and spec.bits in (4, 5, 8):
        return SPECS[f"Q{spec.bits}_0"]
    return spec
