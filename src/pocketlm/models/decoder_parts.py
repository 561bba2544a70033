"""The parts of a plain decoder: what a step needs that does not run through the model's own code.

Plain: blocks of RMS norm, attention with rotary positions, RMS norm, gated MLP, each added to the
residual (Llama, Mistral, Qwen2, Qwen3 and others built alike). The names say what a part should be;
whether the model means the same is for the caller to try against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "proportional")  # whose angles never change
BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class Norm:
    """x / rms(x) · weight."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Block:
    """The parts of one block; linears as modules, since they may be packed.

    Attributes:
        window: Positions that attention sees; None for all.
    """

    attention_norm: Norm
    qkv: tuple[nn.Module, nn.Module, nn.Module]
    head_norms: tuple[Norm, Norm] | None
    output: nn.Module
    mlp_norm: Norm
    gate_up: tuple[nn.Module, nn.Module]
    down: nn.Module
    window: int | None


@dataclass(frozen=True)
class Parts:
    """All of a model.

    Attributes:
        embedding: Ids to vectors.
        blocks: In order.
        norm: The last one.
        head: Vectors to logits.
        rotary: Gives cosines and sines for positions.
        activation: Between gate and product.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Width of each.
        scale: Of scores.
    """

    embedding: nn.Module
    blocks: tuple[Block, ...]
    norm: Norm
    head: nn.Module
    rotary: nn.Module
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    def angles(self, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, D] in the dtype and on the device of a tensor."""
        position_1T = torch.arange(positions, device=like.device)[None]
        cos_1TD, sin_1TD = self.rotary(like, position_1T)
        return cos_1TD[0], sin_1TD[0]


class _NotPlain(Exception):
    """Says what is there that a plain decoder has not."""


def decoder_parts(model: PreTrainedModel) -> Parts | str:
    """The parts of a plain decoder, or what it has that a plain one has not."""
    try:
        return _parts(model)
    except _NotPlain as reason:
        return str(reason)


def _parts(model: PreTrainedModel) -> Parts:
    base: Any = model.base_model
    head = model.get_output_embeddings()
    if head is None or base is model:
        raise _NotPlain("it has no head of its own")
    _same_children(base, BASE)
    _same_children(model, {model.base_model_prefix, "lm_head"})
    rotary = base.rotary_emb
    if getattr(rotary, "rope_type", None) not in ROPE_KINDS:
        raise _NotPlain("its rotary angles depend on the length")
    attention, mlp = base.layers[0].self_attn, base.layers[0].mlp
    kept = DynamicCache(config=model.config).layers
    if len(kept) != len(base.layers):
        raise _NotPlain("layers share keys and values")
    windows = [getattr(layer, "sliding_window", None) for layer in kept]
    pairs = zip(base.layers, windows, strict=True)
    width = int(attention.head_dim)
    return Parts(
        embedding=base.embed_tokens,
        blocks=tuple(_block(layer, window) for layer, window in pairs),
        norm=_norm(base.norm),
        head=head,
        rotary=rotary,
        activation=mlp.act_fn,
        heads=_rows(attention.q_proj) // width,
        kv_heads=_rows(attention.k_proj) // width,
        head_dim=width,
        scale=float(attention.scaling),
    )


def _block(layer: Any, window: int | None) -> Block:
    _same_children(layer, BLOCK)
    attention, mlp = layer.self_attn, layer.mlp
    _same_children(attention, ATTENTION, HEAD_NORMS)
    _same_children(mlp, MLP)
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
    return Block(
        attention_norm=_norm(layer.input_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=head_norms,
        output=attention.o_proj,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        window=window,
    )


def _norm(module: Any) -> Norm:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        raise _NotPlain(f"{type(module).__name__} is no RMS norm")
    return Norm(module.weight, float(epsilon))


def _rows(linear: Any) -> int:
    return int(linear.out_features)


def _same_children(module: nn.Module, needed: Set[str], allowed: Set[str] = frozenset()) -> None:
    names = {name for name, _ in module.named_children()}
    odd = (names - needed - allowed) | (needed - names)
    if odd:
        raise _NotPlain(f"{type(module).__name__} is not of the plain kind ({min(odd)})")
