"""Tiny random models of every family."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = {"tie_word_embeddings": True}
OPT = {
    **{k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "tie_word_embeddings": True,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
FALCON = {**SMALL, "alibi": False}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
SLIDING = {"head_dim": 8, "sliding_window": 5, "layer_types": None}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama-bias-tied": ("LlamaConfig", {**SMALL, **TIED, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, **TIED, "head_dim": 8}),
    "mistral-window": ("MistralConfig", {**SMALL, "sliding_window": 5}),
    "gemma2": ("Gemma2Config", {**SMALL, **TIED, **SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, **TIED, **SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", SMALL),
    "opt": ("OPTConfig", OPT),
    "opt-350m-style": (
        "OPTConfig",
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gpt-neox": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": True}),
    "gpt-neox-serial": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False}),
    "olmo2": ("Olmo2Config", SMALL),
    "falcon-parallel": ("FalconConfig", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-new": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": (
        "FalconConfig",
        {**FALCON, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **SMALL,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            **SMALL,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "phimoe": ("PhimoeConfig", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {
            **SMALL,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "moe_layers": [0, 2],
        },
    ),
    "gpt-bigcode": (
        "GPTBigCodeConfig",
        GPT2,
    ),
    "granite": (
        "GraniteConfig",
        {**SMALL, **TIED, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    ),
    "cohere": ("CohereConfig", {**SMALL, **TIED, "logit_scale": 0.25}),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model; norms and biases are random too, so that a lost one shows."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**options, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
