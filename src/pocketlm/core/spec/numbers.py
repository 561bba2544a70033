"""Number formats of weights, and those of llama.cpp by its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from pocketlm.core.spec.strict import Strict

GROUP_SIZES = (128, 64, 32)  # what kernels of every target take, best first
NumberType = Literal["int", "float", "nf", "bnb_fp", "iq4_nl", "k"]
ScaleType = Literal["float", "e8m0", "e4m3", "dynamic8", "k"]

DOUBLE_BLOCK = 256  # scales that share one constant where they are quantized themselves
SUPER_BLOCK = 256  # columns whose scales are integers over one float16 (llama.cpp's K-quants)
SUB_SCALE_BITS = {2: 4, 3: 6, 4: 6, 5: 6, 6: 8}  # bits of a K-quant's codes → of its scales

# What may stand together beside integers: (type, bits) → scale → group size (None: any).
_FLOATS: dict[tuple[str, int], dict[str, int | None]] = {
    ("float", 4): {"e8m0": 32, "e4m3": 16},
    ("float", 8): {"float": None, "e8m0": 32},
    ("nf", 2): {"float": None, "dynamic8": None},
    ("nf", 3): {"float": None, "dynamic8": None},
    ("nf", 4): {"float": None, "dynamic8": None},
    ("bnb_fp", 4): {"float": None, "dynamic8": None},
    ("iq4_nl", 4): {"float": 32},
    ("k", 2): {"k": 16},
    ("k", 3): {"k": 16},
    ("k", 4): {"k": 32, "float": 32},
    ("k", 5): {"k": 32, "float": 32},
    ("k", 6): {"k": 16},
}
_SYMMETRIC_K = (3, 6)  # bits of the K-quants that have no minima


class QuantSpec(Strict):
    """A number format: w ≈ scale · (level - zero), one scale for each tile of the weight.

    Attributes:
        bits: Bits of a code: 2 to 8 for "int", 4 or 8 for "float", 2 to 4 for "nf", 2 to 6 for
            "k", else 4.
        symmetric: True: zero is 0; integers and "k" alone may be asymmetric.
        group_size: Columns of a tile; None: all of them.
        type: What a code stands for. "int": -2^(bits-1) to 2^(bits-1)-1; "float": E2M1 (4 bits) or
            E4M3 (8 bits); "nf": quantiles of the normal distribution (QLoRA, arXiv:2305.14314);
            "bnb_fp": the 4-bit float of bitsandbytes; "iq4_nl": llama.cpp's table of 16 levels;
            "k": integers as llama.cpp's blocks have them, from 0 on and less a minimum of the group
            where asymmetric (Q2_K, Q4_K, Q5_K, Q4_1, Q5_1), else around 0 (Q3_K, Q6_K).
        group_rows: Rows of a tile; None: all of them. Other than 1 for 8-bit floats alone.
        scale: What a scale is stored as. "float": the 16-bit float of the weights; "e8m0": a power
            of two in 8 bits (OCP MX); "e4m3": an 8-bit float, over one float32 of the whole tensor
            (NVFP4); "dynamic8": quantized again to 8 bits in blocks of 256 (QLoRA, section 3);
            "k": an integer over a float16 of 256 columns, as is a minimum (K-quants).
    """

    bits: int = Field(4, ge=2, le=8)
    symmetric: bool = True
    group_size: int | None = Field(128, ge=8)
    type: NumberType = "int"
    group_rows: int | None = Field(default=1, ge=1)
    scale: ScaleType = "float"

    @model_validator(mode="after")
    def _stand_together(self) -> Self:
        problem = _contradiction(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out what an integer grid does not need: files written before stay as they are."""
        unsaid = {"type": "int", "group_rows": 1, "scale": "float"}
        return {k: v for k, v in plain(self).items() if k not in unsaid or v != unsaid[k]}

    @property
    def code_min(self) -> int:
        """The smallest code of an integer, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code of an integer, 2^(bits-1)-1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def name(self) -> str:
        """The format's short name, such as ``INT4``, ``FP8_BLOCK``, ``NVFP4`` or ``NF4_DQ``."""
        if self.type == "int":
            return f"INT{self.bits}"
        if self.type == "iq4_nl":
            return "IQ4_NL"
        if self.type == "k":
            return f"Q{self.bits}_{'K' if self.scale == 'k' else 1}"
        if self.type != "float":
            number = f"NF{self.bits}" if self.type == "nf" else "FP4"
            return f"{number}_DQ" if self.scale == "dynamic8" else number
        if self.scale != "float":
            return "NVFP4" if self.scale == "e4m3" else f"MXFP{self.bits}"
        if self.group_rows == 1:
            return "FP8_CHANNEL" if self.group_size is None else "FP8_GROUP"
        return "FP8_TENSOR" if self.group_rows is None else "FP8_BLOCK"

    def tiles(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(R, G): how many tiles, each with a scale, lie below and beside each other."""
        rows, columns = shape
        height, width = self.group_rows or rows, self.group_size or columns
        return -(-rows // height), -(-columns // width)

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = 16) -> int:
        """Bits of a weight [O, I]: codes, scales, zero points and the constants of the scales.

        Args:
            shape: (O, I).
            scale_bits: Of a scale that is stored as a plain float.
        """
        below, beside = self.tiles(shape)
        scales = below * beside
        constants = {"e4m3": 1, "dynamic8": -(-scales // DOUBLE_BLOCK) + 1}.get(self.scale, 0)
        if self.scale == "k":
            constants = -(-shape[1] // SUPER_BLOCK) * shape[0] / (2 if self.symmetric else 1)
        each = self._scale_bits(scale_bits)
        return shape[0] * shape[1] * self.bits + scales * each + int(32 * constants)

    def _scale_bits(self, scale_bits: int) -> int:
        """Stored bits of a tile's scale and zero point or minimum; an integer scale has a byte."""
        scale = scale_bits if self.scale == "float" else 8
        if self.symmetric:
            return scale
        return 2 * scale if self.type == "k" else scale + self.bits

    def bits_per_weight(self, columns: int, scale_bits: int = 16, rows: int | None = None) -> float:
        """Real bits of one weight, everything counted.

        Args:
            columns: I.
            scale_bits: Of a scale that is stored as a plain float.
            rows: O; None: so many that the constants of a whole tensor vanish.
        """
        if rows is not None:
            return self.stored_bits((rows, columns), scale_bits) / (rows * columns)
        if self.group_rows is None:
            return float(self.bits)
        constants = 32 / DOUBLE_BLOCK if self.scale == "dynamic8" else 0.0
        shared = (16 if self.symmetric else 32) / SUPER_BLOCK if self.scale == "k" else 0.0
        each = self._scale_bits(scale_bits) + constants
        return self.bits + shared + each / (self.group_rows * (self.group_size or columns))

    def fit(self, columns: int) -> QuantSpec:
        """The same format with a group size that divides `columns`.

        The group size stays when it divides; else it becomes the largest smaller one of
        128, 64, 32 that does; else the whole row shares a scale. The caller announces it. K-quants
        become what llama-quantize takes instead. Other formats with groups of their own, and blocks
        of rows, which may end short, stay as they are.
        """
        if self.scale == "k" and not self.fits(columns) and columns % 32 == 0:
            return GGUF_TYPES[GGUF_FALLBACKS[f"Q{self.bits}_K"]]
        if self.group_size is None or self.fits(columns) or self.fixed_groups:
            return self
        smaller = [g for g in GROUP_SIZES if g < self.group_size and columns % g == 0]
        return self.model_copy(update={"group_size": smaller[0] if smaller else None})

    @property
    def by_rows(self) -> bool:
        """Whether a row is stored by itself: no zero points, and no scale or constant shared."""
        if self.type == "k":
            return True
        return self.symmetric and self.group_rows == 1 and self.scale in ("float", "e8m0")

    @property
    def fixed_groups(self) -> bool:
        """Whether the format prescribes its group size."""
        return _FLOATS.get((self.type, self.bits), {}).get(self.scale) is not None

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns can be cut into this format's groups."""
        if self.scale == "k":
            return columns % SUPER_BLOCK == 0
        return self.group_size is None or self.group_rows != 1 or columns % self.group_size == 0


def _contradiction(spec: QuantSpec) -> str | None:
    """What does not go together in a number format, as a sentence without its end."""
    kind = f"'{spec.type}' of {spec.bits} bits"
    if spec.type == "int":
        known: dict[str, int | None] | None = {"float": None}
    else:
        known = _FLOATS.get((spec.type, spec.bits))
        if known is None:
            bits = [str(bits) for name, bits in _FLOATS if name == spec.type]
            return f"'{spec.type}' has {' or '.join(bits)} bits, not {spec.bits}"
        if spec.type == "k":
            if spec.symmetric != (spec.bits in _SYMMETRIC_K):
                form = "asymmetric" if spec.symmetric else "symmetric"
                return f"{kind} is {form}"
        elif not spec.symmetric:
            return f"{kind} has no zero points; only 'int' and 'k' may be asymmetric"
    if spec.scale not in known:
        listed = [f"'{s}'" + (f" in groups of {g}" if g else "") for s, g in known.items()]
        return f"{kind} takes the scale {' or '.join(listed)}, not '{spec.scale}'"
    group = known[spec.scale]
    if group is not None and spec.group_size != group:
        return f"{kind} with scales '{spec.scale}' has groups of {group}, not {spec.group_size}"
    if spec.group_rows != 1:
        if (spec.type, spec.bits, spec.scale) != ("float", 8, "float"):
            return f"{kind} with scales '{spec.scale}' has a scale for each row (group_rows 1)"
        if (spec.group_rows is None) != (spec.group_size is None):
            return "group_rows and group_size are both given (a block) or both null (the tensor)"
    return None


def _k_quant(bits: int, scale: ScaleType = "k") -> QuantSpec:
    symmetric = bits in _SYMMETRIC_K
    group_size = _FLOATS["k", bits][scale]
    return QuantSpec(bits=bits, type="k", symmetric=symmetric, group_size=group_size, scale=scale)


# llama.cpp's types that hold number formats, by its names. TQ2_0 holds the codes -1, 0, 1 and 2.
GGUF_TYPES: dict[str, QuantSpec] = {
    "Q4_0": QuantSpec(bits=4, group_size=32),
    "Q5_0": QuantSpec(bits=5, group_size=32),
    "Q8_0": QuantSpec(bits=8, group_size=32),
    "Q4_1": _k_quant(4, "float"),
    "Q5_1": _k_quant(5, "float"),
    **{f"Q{bits}_K": _k_quant(bits) for bits in SUB_SCALE_BITS},
    "IQ4_NL": QuantSpec(bits=4, type="iq4_nl", group_size=32),
    "TQ2_0": QuantSpec(bits=2, group_size=SUPER_BLOCK),
}

# What a type becomes where 256 does not divide the columns: llama-quantize's own choice.
GGUF_FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
