"""Reads and judges config.json before anything large is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from pocketlm.core.errors import SecurityError, SourceError, UnsupportedModel, nearest
from pocketlm.formats.pocketlm import only_shortcuts
from pocketlm.formats.read import READABLE

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        SourceError: If it is absent or no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        remedy = "Give the directory of a Hugging Face checkpoint."
        raise SourceError("holds no config.json.", where=str(directory), remedy=remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        what, remedy = f"cannot be read ({error}).", "Download or copy the model again."
        raise SourceError(what, where=str(path), remedy=remedy) from error
    if not isinstance(config, dict):
        raise SourceError("is no JSON object.", where=str(path))
    return config


def judge_config(
    config: Mapping[str, Any], where: str, *, trust_remote_code: bool, allow_compressed: bool
) -> None:
    """Refuses what is no unquantized causal language model.

    Args:
        config: config.json.
        where: The checkpoint, for messages.
        trust_remote_code: Whether code from the checkpoint may run.
        allow_compressed: Whether formats that can be decoded here pass; what only has its blocks
            turned apart always does, as no value of it is on a grid.

    Raises:
        UnsupportedModel: If it is quantized already, or generates no text.
        SecurityError: If it needs code from the checkpoint.
    """
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "an unnamed method")
        if allow_compressed and method not in READABLE:
            raise UnsupportedModel(
                f"is quantized by {method}, which is not read here.",
                where=where,
                remedy=nearest(str(method), READABLE),
            )
        if not allow_compressed and not only_shortcuts(config):
            raise UnsupportedModel(
                f"is already quantized by {method}.",
                where=where,
                remedy="Start from the model it was made from: two grids lose twice. "
                "Where there is none, decode it with `pocketlm export` and start from that.",
            )
    model_type = config.get("model_type")
    if model_type is None:
        raise SourceError("config.json names no model_type.", where=where)
    if config.get("auto_map") and not trust_remote_code and model_type not in CONFIG_MAPPING:
        code = config["auto_map"].get("AutoConfig", "auto_map")
        raise SecurityError(
            f"needs code from the checkpoint to run ({code}).",
            where=where,
            remedy="Read that code, then pass --trust-remote-code.",
        )
    architectures = config.get("architectures") or []
    generative = any(name.endswith(GENERATIVE) for name in architectures)
    if config.get("is_encoder_decoder") or (architectures and not generative):
        raise UnsupportedModel(
            f"{', '.join(architectures) or model_type} is no causal language model.",
            where=where,
            remedy="Only decoders that predict the next token are compressed.",
        )


def transformers_config(directory: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration as transformers reads it.

    Raises:
        UnsupportedModel: If this version of transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError) as error:
        model_type = read_config(directory).get("model_type")
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot read '{model_type}': {error}",
            where=str(directory),
            remedy="Install a version of transformers that knows it.",
        ) from error


def head_width(config: PretrainedConfig) -> int:
    """Width of an attention head, by the keys that configurations use."""
    known = config.to_dict()
    if isinstance(known.get("head_dim"), int):
        return known["head_dim"]
    return int(config.hidden_size) // int(config.num_attention_heads)


def context_length(config: PretrainedConfig) -> int:
    """The longest position that a model was made for, by the key of its config; else 2048."""
    known = config.to_dict()
    for key in (
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "n_ctx",
        "seq_length",
    ):
        if isinstance(known.get(key), int):
            return known[key]
    return 2048
