"""A Llama-shaped model with random weights, made on the device: nothing is written to disk."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm.core.tensors import PackedInt
from pocketlm.runtime.linear import PackedLinear

STD = 0.02  # of weights: keeps activations finite through all blocks


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of the model; the defaults are those of Llama-3-8B."""

    hidden: int = 4096
    feed_forward: int = 14336
    blocks: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    def config(self) -> LlamaConfig:
        """As transformers wants it."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )


def random_llama(
    shape: LlamaShape,
    device: torch.device | str,
    *,
    bits: int | None,
    group: int | None = 128,
    head_bits: int | None = None,
) -> Any:
    """The model in bfloat16, ready to decode.

    Args:
        shape: Its sizes.
        device: Where it lies.
        bits: Of the blocks' linears; None for bfloat16.
        group: Columns that share a scale; None where a row does.
        head_bits: Of the head; None for bfloat16.

    Returns:
        A transformers model whose compressed linears are PackedLinear.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).to(torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    made: dict[tuple[int, int, int], PackedLinear] = {}
    for name, module in list(model.named_modules()):
        width = head_bits if name == "lm_head" else bits
        if isinstance(module, nn.Linear) and width is not None:
            key = (module.out_features, module.in_features, width)
            if key not in made:
                made[key] = _packed(*key, group, device)
            model.set_submodule(name, _clone(made[key]))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1.0) if value.ndim == 1 else value.normal_(std=STD)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return model


def _packed(
    rows: int, columns: int, bits: int, group: int | None, device: torch.device
) -> PackedLinear:
    half = 1 << (bits - 1)
    codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=device)
    groups = columns // (group or columns)
    scale_OG = torch.full((rows, groups), STD / (0.58 * half), device=device)
    weight = PackedInt(codes_OI, scale_OG, None, bits)
    return PackedLinear(weight, dtype=torch.bfloat16, device=device)


def _clone(linear: PackedLinear) -> PackedLinear:
    """The same codes in memory of their own: no layer may find another's in a cache."""
    return copy.deepcopy(linear)
