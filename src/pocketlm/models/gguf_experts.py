"""Mixtures of experts as a GGUF file holds them: stacked matrices, keys, what llama.cpp computes.

Checkpoints hold a matrix for each expert; a file stacks those of a layer's place, [E, O, I].
llama.cpp's graphs fix what transformers leaves to the configuration: the weights of a token's
experts are normalized for Mixtral and Qwen 3 and never for Qwen 2, and every block has experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import MixtralConfig, PretrainedConfig

from pocketlm.core.errors import ArtifactError
from pocketlm.models.config import head_width
from pocketlm.models.gguf_write import Value, u32

EXPERT = re.compile(r"\.experts\.(\d+)\.")
MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}  # linears of an expert in its checkpoints
WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
NORMALIZED = {"qwen3moe": True, "qwen2moe": False}  # whether a token's weights are made to sum to 1


def expert_count(config: PretrainedConfig) -> int:
    """How many experts a block has; 0 of a dense model."""
    known = (getattr(config, key, None) for key in ("num_local_experts", "num_experts"))
    return next((int(count) for count in known if count), 0)


def experts_metadata(config: PretrainedConfig) -> dict[str, Value]:
    """The keys of a mixture; none of a dense model."""
    count = expert_count(config)
    if not count:
        return {}
    keys = {"expert_count": u32(count), "expert_used_count": u32(config.num_experts_per_tok)}
    for key, own in WIDTHS.items():
        if getattr(config, own, None):
            keys[key] = u32(getattr(config, own))
    return keys


def why_not(config: PretrainedConfig, arch: str) -> str | None:
    """What llama.cpp would compute otherwise of a mixture; None: nothing.

    Args:
        config: transformers' configuration.
        arch: llama.cpp's name of the architecture.
    """
    count = expert_count(config)
    if not count:
        return None
    if not 0 < config.num_experts_per_tok <= count:
        return f"a token uses {config.num_experts_per_tok} of {count} experts"
    normalized = NORMALIZED.get(arch)
    if normalized is None:
        return None
    if bool(config.norm_topk_prob) != normalized:
        does = "normalizes" if normalized else "does not normalize"
        return (
            f"norm_topk_prob is {config.norm_topk_prob}, llama.cpp's {arch} {does} the weights of "
            "a token's experts"
        )
    for block in range(config.num_hidden_layers):
        if block in (config.mlp_only_layers or ()) or (block + 1) % config.decoder_sparse_step:
            return f"block {block} has no experts, which llama.cpp's {arch} has in every block"
    if getattr(config, "attention_bias", False):
        return f"attention has biases, for which llama.cpp's {arch} has no place"
    if arch == "qwen2moe" and config.tie_word_embeddings:
        return f"the head is tied, which llama.cpp's {arch} has apart"
    if arch == "qwen2moe" and head_width(config) * config.num_attention_heads != config.hidden_size:
        return f"heads are wider than their share of {config.hidden_size}, which {arch} cannot say"
    return None


def stacks(names: Mapping[str, str], experts: int) -> dict[str, tuple[str, ...]]:
    """What each tensor of a file is made of.

    Args:
        names: Of the checkpoint → of the file; the experts of a stack have one name.
        experts: How many a block has.

    Returns:
        Name in the file → one tensor of the checkpoint, or the matrices of a block's experts in
        their order.

    Raises:
        ArtifactError: If an expert is missing, or two tensors have one name.
    """
    found: dict[str, dict[int, str]] = {}
    for name, spelled in names.items():
        expert = EXPERT.search(name)
        place = int(expert[1]) if expert else 0
        if place in found.setdefault(spelled, {}):
            raise ArtifactError(f"'{name}' has the name of another tensor.", where=spelled)
        found[spelled][place] = name
    for spelled, members in found.items():
        if is_stack(spelled) and sorted(members) != list(range(experts)):
            there = ", ".join(map(str, sorted(members)))
            raise ArtifactError(
                f"needs the experts 0 to {experts - 1}; the checkpoint holds {there}.",
                where=spelled,
                remedy="It is incomplete, or config.json belongs to another model.",
            )
    return {name: tuple(members[i] for i in sorted(members)) for name, members in found.items()}


def is_stack(tensor: str) -> bool:
    """Whether a tensor of a file holds the matrices of all experts of a block."""
    return tensor.endswith("_exps.weight")


def as_mixture(config: PretrainedConfig, stated: Mapping[str, Any], arch: str) -> PretrainedConfig:
    """The configuration of a file's mixture, which transformers reads in part.

    It takes Mixtral, which has llama.cpp's architecture ``llama``, for a dense Llama, and leaves
    the widths of experts at their defaults.

    Args:
        config: As transformers made it of the file; perhaps changed in place.
        stated: Metadata of the file.
        arch: llama.cpp's name of the architecture.
    """
    count = stated.get(f"{arch}.expert_count")
    if arch == "llama" and count:
        known = MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
        kept = {key: value for key, value in config.to_dict().items() if key in known}
        used = stated.get("llama.expert_used_count")
        own = {"num_local_experts": count, "num_experts_per_tok": used, "sliding_window": None}
        return MixtralConfig(**{**kept, **own})
    known = config.to_dict()
    for key, own in WIDTHS.items():
        width = stated.get(f"{arch}.{key}")
        if width and own in known:
            setattr(config, own, width)
    return config


def checkpoint_name(parameter: str, model_type: str) -> str:
    """What a checkpoint calls a parameter that is no expert's: Mixtral's routers have other names.

    Args:
        parameter: transformers' name.
        model_type: Of the model.
    """
    return (
        parameter.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else parameter
    )


def expert_name(parameter: str, tensor: str, expert: int, model_type: str) -> str:
    """What a checkpoint calls the matrix of one expert.

    Args:
        parameter: transformers' name of the fused experts.
        tensor: Name of the stack in the file.
        expert: Its number.
        model_type: Of the model.
    """
    part = tensor.split(".")[-2].removeprefix("ffn_").removesuffix("_exps")
    linear = MIXTRAL[part] if model_type == "mixtral" else f"{part}_proj"
    folder = checkpoint_name(parameter, model_type).partition(".experts.")[0]
    return f"{folder}.experts.{expert}.{linear}.weight"
