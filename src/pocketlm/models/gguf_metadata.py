"""What a GGUF file says of a model beside its weights: configuration, rotary scaling, names.

The keys and conventions are those of llama.cpp's converter for Llama, Mistral, Qwen 2 and 3, Gemma
1 to 3, Phi-3 and the mixtures of Mixtral and Qwen. What llama.cpp would compute otherwise than
transformers is refused, not written: a file that loads and answers wrong is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pocketlm.core.errors import UnsupportedModel
from pocketlm.formats.gguf_mix import Architecture
from pocketlm.models.config import head_width
from pocketlm.models.gguf_experts import expert_count, experts_metadata, why_not
from pocketlm.models.gguf_write import Value, array, f32, flag, text, u32

# transformers' model type → llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "mixtral": "llama",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
GEMMAS = ("gemma", "gemma2", "gemma3")
SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6}  # every how many-th block sees everything
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # blocks of the one whose scores have a scale apart
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
WHERE = "config.json"
REMEDY = "Keep the model in another format: pocketlm export --to dense."


def architecture(config: PretrainedConfig) -> Architecture:
    """What llama.cpp calls a model, and what its type rules ask of it.

    Raises:
        UnsupportedModel: If no writer for it exists here.
    """
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise UnsupportedModel(
            f"a '{config.model_type}' model is not written as GGUF here.",
            where=WHERE,
            remedy=f"Written are {', '.join(sorted(ARCHITECTURES))}.",
        )
    heads = config.num_attention_heads
    return Architecture(
        name,
        config.num_hidden_layers,
        heads // (config.num_key_value_heads or heads),
        bool(config.tie_word_embeddings),
        expert_count(config),
    )


def metadata(config: PretrainedConfig, name: str, file_type: int) -> dict[str, Value]:
    """The keys of a model's configuration.

    Args:
        config: transformers' configuration of the text model.
        name: Of the model, for people.
        file_type: llama.cpp's number of the mixture of types.

    Raises:
        UnsupportedModel: If rotary scaling has no key.
    """
    arch = architecture(config).name
    width = head_width(config)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    own = {
        "vocab_size": u32(config.vocab_size),
        "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size),
        "block_count": u32(config.num_hidden_layers),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(kv_heads),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "attention.key_length": u32(width),
        "attention.value_length": u32(width),
        "rope.dimension_count": u32(_rotated(config)),
        **experts_metadata(config),
        **_windows(config, arch),
        **_rotary(config, arch),
    }
    for key in CAPS:
        cap = getattr(config, key, None)
        if cap:
            own[key] = f32(cap)
    return {
        "general.architecture": text(arch),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": u32(file_type),
        "general.quantization_version": u32(2),
        **{f"{arch}.{key}": value for key, value in own.items()},
    }


def score_width(config: PretrainedConfig, arch: str) -> int:
    """What llama.cpp scales Gemma's attention scores by, as a width of heads."""
    if config.num_hidden_layers == LARGEST_GEMMA.get(arch):
        return config.hidden_size // config.num_attention_heads
    return head_width(config)


def complete(config: PretrainedConfig, stated: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Takes over what a file says and transformers' reader leaves at its defaults.

    Args:
        config: As transformers made it of the file; changed in place.
        stated: Metadata of the file.
        arch: llama.cpp's name of the architecture.

    Returns:
        What was changed.
    """
    known, changed = config.to_dict(), dict[str, Any]()
    width = stated.get(f"{arch}.attention.key_length")
    if width is not None and "head_dim" in known and known["head_dim"] != width:
        changed["head_dim"] = width
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        index = known.get(role)
        if isinstance(index, int) and index >= config.vocab_size:  # another model's
            changed[role] = None
    for key in CAPS:
        if key in known and f"{arch}.{key}" in stated:
            changed[key] = stated[f"{arch}.{key}"]
    for key, value in changed.items():
        setattr(config, key, value)
    if "query_pre_attn_scalar" in known:
        changed["query_pre_attn_scalar"] = score_width(config, arch)
        config.query_pre_attn_scalar = changed["query_pre_attn_scalar"]
    return changed


def require_same_function(config: PretrainedConfig, arch: str) -> None:
    """Refuses what llama.cpp would load and compute otherwise.

    Args:
        config: transformers' configuration.
        arch: llama.cpp's name of the architecture.

    Raises:
        UnsupportedModel: With what differs.
    """
    reason = why_not(config, arch)
    if reason is not None:
        raise _refused(reason)
    expected = "gelu_pytorch_tanh" if arch in GEMMAS else "silu"
    known = config.to_dict()
    activation = known.get("hidden_activation") or known.get("hidden_act")
    if activation not in (expected, "gelu" if arch == "gemma" else expected):
        raise _refused(f"the activation '{activation}' is not what llama.cpp computes for {arch}")
    scale = known.get("query_pre_attn_scalar")
    if arch in LARGEST_GEMMA and scale is not None and scale != score_width(config, arch):
        computed = score_width(config, arch)
        raise _refused(f"query_pre_attn_scalar is {scale}, llama.cpp computes with {computed}")
    if known.get("use_bidirectional_attention"):
        raise _refused("attention looks ahead")
    for index, kind in enumerate(known.get("layer_types") or ()):
        period = SLIDING_PERIOD.get(arch)
        sliding = period is not None and (index + 1) % period != 0
        if sliding != (kind == "sliding_attention"):
            raise _refused(f"block {index} is '{kind}', which llama.cpp's {arch} has elsewhere")


def _windows(config: PretrainedConfig, arch: str) -> dict[str, Value]:
    """The sliding window, of architectures for which llama.cpp reads one."""
    window = getattr(config, "sliding_window", None)
    if arch in SLIDING_PERIOD and window:
        return {"attention.sliding_window": u32(window)}
    return {"attention.sliding_window": u32(window or 0)} if arch == "phi3" else {}


def window_note(config: PretrainedConfig) -> str | None:
    """What is to be told of a sliding window that llama.cpp does not compute; None: nothing."""
    arch, window = architecture(config).name, getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    used = getattr(config, "use_sliding_window", True)
    if arch in SLIDING_PERIOD or not window or not used or window >= context:
        return None
    return f"llama.cpp ignores the sliding window of {window} tokens: longer texts differ."


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary parameters of the blocks that see everything."""
    known = dict(config.rope_parameters or {})
    return dict(known.get("full_attention", known))


def _rotated(config: PretrainedConfig) -> int:
    """How many of a head's columns are rotated."""
    known = _parameters(config)
    share = known.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0)
    return int(head_width(config) * (share or 1.0))


def _rotary(config: PretrainedConfig, arch: str) -> dict[str, Value]:
    known = _parameters(config)
    keys = {"rope.freq_base": f32(known.get("rope_theta", 10000.0))}
    local = dict(config.rope_parameters or {}).get("sliding_attention")
    if isinstance(local, Mapping):
        if local.get("rope_type", "default") != "default":
            raise _refused("rotary frequencies of sliding blocks are scaled")
        keys["rope.freq_base_swa"] = f32(local["rope_theta"])
    kind = known.get("rope_type", "default")
    original = known.get("original_max_position_embeddings")
    if arch == "phi3":
        original = original or getattr(config, "original_max_position_embeddings", None)
        keys["rope.scaling.original_context_length"] = u32(
            original or config.max_position_embeddings
        )
    if kind in ("default", "llama3"):  # the second is a table of its own
        return keys
    if kind == "linear":
        factor = f32(known["factor"])
        return {**keys, "rope.scaling.type": text("linear"), "rope.scaling.factor": factor}
    if kind == "yarn":
        keys |= {"rope.scaling.type": text("yarn"), "rope.scaling.factor": f32(known["factor"])}
        keys["rope.scaling.original_context_length"] = u32(
            original or config.max_position_embeddings
        )
        for own, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if known.get(own) is not None:
                keys[f"rope.scaling.{theirs}"] = f32(known[own])
        if known.get("attention_factor") is not None or known.get("mscale") is not None:
            raise _refused("rotary scaling has an attention factor of its own")
        return keys
    if kind == "longrope" and arch == "phi3" and original is not None:
        scale = config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        keys["rope.scaling.type"] = text("longrope")
        return {**keys, "rope.scaling.attn_factor": f32(known.get("attention_factor") or attention)}
    raise _refused(f"rotary scaling '{kind}' has no key in a GGUF file of {arch}")


def rotary_tables(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensor name → float32 divisors of the rotary frequencies, where they are scaled by tables."""
    known = _parameters(config)
    kind = known.get("rope_type", "default")
    if kind == "llama3":
        scaled_F, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        places_F = torch.arange(len(scaled_F), dtype=torch.float64) / len(scaled_F)
        plain_F = float(known["rope_theta"]) ** -places_F
        return {"rope_freqs.weight": (plain_F / scaled_F.double()).float()}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(known[f"{name}_factor"]).float()
            for name in ("long", "short")
        }
    return {}


def tokens_metadata(tokens: Mapping[str, Any]) -> dict[str, Value]:
    """The keys of a vocabulary, from plain values.

    Args:
        tokens: Key behind ``tokenizer.`` → text, number, truth value or list.
    """
    kinds = {"scores": 6, "token_type": 5}
    made: dict[str, Value] = {}
    for key, value in tokens.items():
        if isinstance(value, list):
            made[key] = array(kinds.get(key.rpartition(".")[2], 8), value)
        elif isinstance(value, bool):
            made[key] = flag(value)
        else:
            made[key] = u32(value) if isinstance(value, int) else text(str(value))
    return {f"tokenizer.{key}": value for key, value in made.items()}


def _refused(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{what}.", where=WHERE, remedy=REMEDY)
