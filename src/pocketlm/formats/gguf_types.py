"""The types of a GGUF file's tensors, by llama.cpp's names: numbers, sizes, number formats."""

from __future__ import annotations

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import GGUF_TYPES, SUPER_BLOCK, QuantSpec

MXFP4 = QuantSpec(bits=4, type="float", group_size=32, scale="e8m0")
SPECS = {**GGUF_TYPES, "TQ1_0": GGUF_TYPES["TQ2_0"], "MXFP4": MXFP4}
NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "BF16": 30, "TQ1_0": 34,
    "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
"""ggml's number of each type written here."""
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of plain values → bytes of one."""


def block_weights(kind: str) -> int:
    """Weights of a block."""
    if kind in FLOATS:
        return 1
    return SUPER_BLOCK if SPECS[kind].scale == "k" or kind in ("TQ1_0", "TQ2_0") else 32


def block_bytes(kind: str) -> int:
    """Bytes of a block."""
    if kind in FLOATS:
        return FLOATS[kind]
    return {
        "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18, "MXFP4": 17,
        "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "TQ1_0": 54, "TQ2_0": 66,
    }[kind]  # fmt: skip


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row.

    Raises:
        ArtifactError: If the type's blocks do not divide it.
    """
    if columns % block_weights(kind):
        raise ArtifactError(f"blocks of {kind} do not divide {columns} columns.")
    return columns // block_weights(kind) * block_bytes(kind)
