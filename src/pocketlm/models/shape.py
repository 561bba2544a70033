"""What a forward pass multiplies, from config.json alone: shapes of linears, experts, attention.

Nothing is downloaded or read but the configuration, and, of a compressed artifact, the headers of
its files, which say how many bits a weight really takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from pocketlm.core.errors import UnsupportedModel
from pocketlm.models.config import (
    head_width,
    judge_config,
    read_config,
    transformers_config,
)
from pocketlm.models.linear import is_linear, linear_shape
from pocketlm.models.opening import open_model, resolve
from pocketlm.models.skeleton import build_skeleton, find_blocks
from pocketlm.models.stream import SafetensorsSource


@dataclass(frozen=True)
class LinearShape:
    """Linears of one kind, one in each of some blocks.

    Attributes:
        kind: Path inside a block, such as ``mlp.down_proj``.
        rows: O.
        columns: I.
        count: Blocks that have it.
        bits: Stored bits of a weight, scales counted; None where the model is not compressed.
        experts: How many of them lie side by side; 1 where it is none of several experts.
        active: Experts that a token uses.
    """

    kind: str
    rows: int
    columns: int
    count: int
    bits: float | None = None
    experts: int = 1
    active: int = 1


@dataclass(frozen=True)
class ModelShape:
    """A model as the roofline sees it.

    Attributes:
        name: Of the source.
        hidden: Width of the residual.
        inner: Width between gate and down of the widest MLP.
        blocks: How many.
        vocabulary: Tokens.
        heads: Of queries.
        head_dim: Width of each.
        cache_values: Values that a block caches for each token.
        windows: Positions that attention sees, for each block that attends; None for all.
        linears: Those of the blocks, by kind.
        head: Vectors to logits.
        dtype_bits: Of what is not compressed.
    """

    name: str
    hidden: int
    inner: int
    blocks: int
    vocabulary: int
    heads: int
    head_dim: int
    cache_values: int
    windows: tuple[int | None, ...]
    linears: tuple[LinearShape, ...]
    head: LinearShape
    dtype_bits: int


def model_shape(source: str | Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Reads the shape of a model.

    Args:
        source: A directory that holds at least config.json, an artifact, a `.gguf` file, a hub id
            or ``smollm2-135m``.
        trust_remote_code: Whether code from the checkpoint may run.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is no causal language model with decoder blocks.
    """
    path, stored = resolve(source), dict[str, float]()
    if path.is_dir():
        config = read_config(path)
        judge_config(config, str(path), trust_remote_code=trust_remote_code, allow_compressed=True)
        known = transformers_config(path, trust_remote_code=trust_remote_code)
        if "quantization_config" in config:
            stored = _stored_bytes(path)
            known.__dict__.pop("quantization_config", None)
        dtype = getattr(known, "dtype", None) or torch.bfloat16
        model = build_skeleton(known, dtype, trust_remote_code=trust_remote_code).model
    else:
        view = open_model(path, trust_remote_code=trust_remote_code)
        model, dtype = view.skeleton.model, view.dtype
    return shape_of(model, Path(source).name, dtype, stored)


def shape_of(
    model: PreTrainedModel, name: str, dtype: torch.dtype, stored: Mapping[str, float]
) -> ModelShape:
    """The shape of a model in memory, its parameters perhaps on the meta device.

    Args:
        model: Not compressed.
        name: To call it by.
        dtype: Of its weights.
        stored: Module path → bytes that it takes compressed.
    """
    config: PretrainedConfig = model.config.get_text_config(decoder=True)
    skeleton = find_blocks(model)
    kinds: dict[tuple[Any, ...], list[float | None]] = {}
    for path, block in zip(skeleton.block_paths, skeleton.blocks, strict=True):
        for inner, rows, columns, experts in _products(block):
            taken = stored.get(f"{path}.{inner}")
            bits = None if taken is None else 8 * taken / (rows * columns * experts)
            kinds.setdefault((inner, rows, columns, experts), []).append(bits)
    active = int(getattr(config, "num_experts_per_tok", None) or 1)
    linears = tuple(
        LinearShape(kind, rows, columns, len(bits), _mean(bits), experts, min(active, experts))
        for (kind, rows, columns, experts), bits in kinds.items()
    )
    head = model.get_output_embeddings()
    if head is None or not linears:
        raise UnsupportedModel("it has no linears or no head.", where=name)
    vocabulary, hidden = head.weight.shape
    paths = {id(module): path for path, module in model.named_modules()}
    taken = stored.get(paths[id(head)])
    bits = None if taken is None else 8 * taken / (vocabulary * hidden)
    heads = int(config.num_attention_heads)
    width = head_width(config)
    return ModelShape(
        name=name,
        hidden=int(hidden),
        inner=max((linear.columns for linear in linears), default=int(hidden)),
        blocks=len(skeleton.blocks),
        vocabulary=int(vocabulary),
        heads=heads,
        head_dim=width,
        cache_values=_cache_values(config, heads, width),
        windows=_windows(model, len(skeleton.blocks)),
        linears=linears,
        head=LinearShape("head", int(vocabulary), int(hidden), 1, bits),
        dtype_bits=torch.finfo(dtype).bits,
    )


def _products(block: nn.Module) -> list[tuple[str, int, int, int]]:
    """Path, rows, columns and number of every matrix of a block; fused experts as theirs."""
    found: dict[tuple[str, int, int], int] = {}
    for path, module in block.named_modules():
        if is_linear(module):
            rows, columns = linear_shape(module)
            parts = path.split(".")
            alone = ".".join(part for part in parts if not part.isdigit())
            found[alone, rows, columns] = found.get((alone, rows, columns), 0) + 1
        for name, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and "experts" in path:
                experts, one, other = value.shape
                found[f"{path}.{name}", one, other] = experts
    return [(*key, count) for key, count in found.items()]


def _cache_values(config: PretrainedConfig, heads: int, width: int) -> int:
    """Keys and values of one token; of latent attention, what engines cache: the latent vector."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent) + int(getattr(config, "qk_rope_head_dim", 0))
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * groups * width


def _windows(model: PreTrainedModel, blocks: int) -> tuple[int | None, ...]:
    """A window for each block that keeps keys and values."""
    layers = DynamicCache(config=model.config).layers or [None] * blocks
    attending = [layer for layer in layers if layer is None or hasattr(layer, "get_mask_sizes")]
    return tuple(getattr(layer, "sliding_window", None) for layer in attending)


def _stored_bytes(directory: Path) -> dict[str, float]:
    """Bytes on disk of every module of an artifact, by path; from the headers alone."""
    source = SafetensorsSource(directory)
    found: dict[str, float] = {}
    for name, info in source.infos().items():
        module = name.rpartition(".")[0]
        found[module] = found.get(module, 0.0) + info.bytes_stored
    source.close()
    return found


def _mean(bits: list[float | None]) -> float | None:
    known = [value for value in bits if value is not None]
    return sum(known) / len(known) if known else None
