"""Which type each tensor of a GGUF file gets, by the name of a mixture such as Q4_K_M.

The rules are llama-quantize's (llama.cpp, src/llama-quant.cpp of 2026), so that a file of ours has
the size of one of its: a base type, more bits for what loses most (the head, values, down
projections of some layers), and another type where 256 does not divide the columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import GGUF_FALLBACKS
from pocketlm.formats.gguf_types import FLOATS, block_weights

# Name → base type, number of the file's kind (llama_ftype).
MIXES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0), "F16": ("F16", 1), "BF16": ("BF16", 32),
    "Q4_0": ("Q4_0", 2), "Q4_1": ("Q4_1", 3), "Q8_0": ("Q8_0", 7), "Q5_0": ("Q5_0", 8),
    "Q5_1": ("Q5_1", 9), "Q2_K": ("Q2_K", 10), "Q3_K_S": ("Q3_K", 11), "Q3_K_M": ("Q3_K", 12),
    "Q3_K_L": ("Q3_K", 13), "Q4_K_S": ("Q4_K", 14), "Q4_K_M": ("Q4_K", 15),
    "Q5_K_S": ("Q5_K", 16), "Q5_K_M": ("Q5_K", 17), "Q6_K": ("Q6_K", 18),
    "IQ4_NL": ("IQ4_NL", 25), "TQ1_0": ("TQ1_0", 36), "TQ2_0": ("TQ2_0", 37),
}  # fmt: skip
GUESSED = 1024  # llama_ftype of a file of no such mixture
_VALUES = ("attn_v", "attn_qkv")
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # what weighs experts
# Mixtures whose attention outputs get Q5_K beside eight experts.
_FIVE_BITS_OF_EIGHT = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Architecture:
    """What the rules ask of a model.

    Attributes:
        name: llama.cpp's name of it.
        blocks: How many there are.
        heads_per_value: Query heads that share a value head.
        tied: Whether the head is the embedding.
        experts: Of each block; 0: none.
    """

    name: str
    blocks: int
    heads_per_value: int
    tied: bool
    experts: int = 0

    @property
    def is_70b(self) -> bool:
        """Whether it is what llama.cpp calls a 70B: its values are few, and get more bits."""
        if self.blocks != 80:
            return False
        return self.name == "qwen2" or (self.name == "llama" and self.heads_per_value > 1)


def require_mix(mix: str, where: str = "--to") -> str:
    """The name of a mixture as it is spelled.

    Raises:
        ConfigError: If there is none of that name.
    """
    if mix.upper() not in MIXES:
        raise ConfigError(
            f"'{mix}' is no type of GGUF files that is written here.",
            where=where,
            remedy=nearest(mix.upper(), MIXES),
        )
    return mix.upper()


def always_plain(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays F32 in every file: vectors, norms, and the routers of experts.

    Args:
        tensor: The tensor's name in the file.
        shape: Its shape, rows first.
    """
    vector = len(shape) < 2 or not tensor.endswith(".weight") or tensor.endswith("_norm.weight")
    return vector or tensor.endswith(_ROUTERS)


def tensor_type(mix: str, tensor: str, shape: tuple[int, ...], model: Architecture) -> str:
    """The type of one tensor.

    Args:
        mix: The mixture, as `require_mix` gives it.
        tensor: The tensor's name in the file.
        shape: Its shape, rows first; of stacked experts [E, O, I], or one of theirs.
        model: What it belongs to.
    """
    if always_plain(tensor, shape):
        return "F32"
    base, _ = MIXES[mix]
    if base in FLOATS:
        return base
    return fitted_type(_wanted(mix, base, tensor, shape[-1], model), shape[-1])


def fitted_type(kind: str, columns: int) -> str:
    """A type, or what takes its place where its blocks do not divide the columns."""
    if columns % block_weights(kind):
        kind = GGUF_FALLBACKS.get(kind, kind)
    return "F16" if columns % block_weights(kind) else kind


def _more_bits(block: int, blocks: int) -> bool:
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _wanted(mix: str, base: str, tensor: str, columns: int, model: Architecture) -> str:
    if tensor == "output.weight" or (tensor == "token_embd.weight" and model.tied):
        return "Q8_0" if columns % block_weights(base) or base == "Q8_0" else "Q6_K"
    if tensor == "token_embd.weight":
        return "Q4_K" if base in ("TQ1_0", "TQ2_0") else base
    found = _BLOCK.fullmatch(tensor)
    if found is None:
        return base
    block, part = int(found[1]), found[2]
    if model.experts == 8 and part in (*_VALUES, "attn_k"):
        return "Q8_0"  # few weights beside those of the experts
    if part in _VALUES:
        kind = _of_values(mix, base, block, model)
        return "Q5_K" if model.is_70b and kind in ("Q3_K", "Q4_K") else kind
    if part in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        return _of_down(mix, base, block, model.blocks)
    if part == "attn_output" and model.experts == 8:
        return "Q5_K" if mix in _FIVE_BITS_OF_EIGHT else base
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, base)
    return base


def _of_values(mix: str, base: str, block: int, model: Architecture) -> str:
    many = model.heads_per_value >= 4
    if mix == "Q2_K":
        return "Q4_K" if many else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if block < 2 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "IQ4_NL" and many):
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(block, model.blocks):
        return "Q6_K"
    return "Q5_K" if mix == "Q4_K_S" and block < 4 else base


def _of_down(mix: str, base: str, block: int, blocks: int) -> str:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if block < blocks // 16 else "Q4_K"
    if mix == "Q3_K_L":
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(block, blocks):
        return "Q6_K"
    return "Q5_K" if mix == "Q4_K_S" and block < blocks // 8 else base
