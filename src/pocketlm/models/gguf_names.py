"""The tensors of a checkpoint as a GGUF file holds them: names, order of rows, shifted norms.

The table of names is that of the `gguf` package, which the reader (`models/gguf.py`) uses in the
other direction.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pocketlm.core.errors import UnsupportedModel
from pocketlm.models.config import head_width
from pocketlm.models.gguf import require_library
from pocketlm.models.gguf_experts import EXPERT
from pocketlm.models.gguf_metadata import GEMMAS, architecture

LEAVES = (".weight", ".bias")


def gguf_names(config: PretrainedConfig, tensors: Iterable[str]) -> dict[str, str]:
    """A checkpoint's tensor names → those of the GGUF file, in the order given.

    Args:
        config: transformers' configuration.
        tensors: Names in the checkpoint.

    Returns:
        Without buffers that llama.cpp computes itself, and a head that is tied. The experts of a
        block's stack have one name.

    Raises:
        UnsupportedModel: If llama.cpp has no place for a tensor.
        ConfigError: If the package gguf is not installed.
    """
    require_library()
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    model = architecture(config)
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == model.name)
    table = get_tensor_name_map(arch, model.blocks)
    found: dict[str, str] = {}
    for name in tensors:
        if name.endswith("rotary_emb.inv_freq") or (model.tied and name == "lm_head.weight"):
            continue
        spelled = table.get_name(EXPERT.sub(".experts.", name), try_suffixes=LEAVES)
        if spelled is None:
            raise UnsupportedModel(
                f"llama.cpp's {model.name} has no place for this tensor.",
                where=name,
                remedy="Keep the model in another format: pocketlm export --to dense.",
            )
        found[name] = spelled
    return found


def row_order(config: PretrainedConfig, tensor: str) -> Tensor | None:
    """In which order the rows of a tensor are written; None: as they are.

    llama.cpp rotates neighbouring columns of a head where transformers rotates its halves: rows of
    queries and keys change places, of its architecture ``llama`` alone.

    Args:
        config: transformers' configuration.
        tensor: The tensor's name in the file.
    """
    part = tensor.split(".")[-2]
    if architecture(config).name != "llama" or part not in ("attn_q", "attn_k"):
        return None
    heads = config.num_attention_heads
    if part == "attn_k":
        heads = config.num_key_value_heads or heads
    width = head_width(config)
    rows_H2h = torch.arange(heads * width).view(heads, 2, width // 2)
    return rows_H2h.transpose(1, 2).flatten()


def norm_shift(config: PretrainedConfig, tensor: str) -> float:
    """What is added to a tensor: Gemma multiplies by 1 + w, llama.cpp by what the file holds."""
    shifted = architecture(config).name in GEMMAS and tensor.endswith("norm.weight")
    return 1.0 if shifted else 0.0
