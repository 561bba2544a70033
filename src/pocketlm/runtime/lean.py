"""One step of a plain decoder, or a prompt, with nothing in it but its arithmetic.

transformers' forward spends hundreds of microseconds a block on Python and on small operations; at
one token that is more than the products take, and on a GPU at a thousand. Here a block is: norm,
one product for queries, keys and values, rotation, attention over the static cache, product, norm,
one product for gate and up, product. On CUDA what lies between products is decode_kernels.py.
Both are trusted only after their logits were compared with those of the model's own forward.

Legend: B rows, T tokens of a row, M = B T (of a step: B), H heads of queries, K heads of keys,
G = H / K, D head width, N positions seen, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from pocketlm.runtime.joined import joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocketlm.models.decoder_parts import Block, Parts
    from pocketlm.models.static_cache import StaticCache
    from pocketlm.runtime.native.step import NativeStep

# Of logits, relative: a step that means something else is off by far more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def normed(x_BC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
    """RMS norm: x / rms(x) in float32, times the weight in the weight's dtype."""
    x32_BC = x_BC.float()
    inverse_B1 = torch.rsqrt(x32_BC.square().mean(-1, keepdim=True) + epsilon)
    return (x32_BC * inverse_B1).to(weight_C.dtype) * weight_C


def added_norm(
    x_BC: Tensor, y_BC: Tensor, weight_C: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    x_BC = x_BC + y_BC
    return x_BC, normed(x_BC, weight_C, epsilon)


def rotated(x_BHD: Tensor, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
    """Rotary positions on the first widths that the angles have, halves paired."""
    width = cos_B1D.shape[-1]
    part, rest = x_BHD[..., :width], x_BHD[..., width:]
    low, high = part.chunk(2, -1)
    turned = part * cos_B1D + torch.cat((-high, low), -1) * sin_B1D
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)


def split_heads(
    qkv_BX: Tensor,
    cos_B1D: Tensor,
    sin_B1D: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    heads: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, K, G, D], keys and values [B, K, 1, D] from the joined product."""
    H, K, D = heads
    x_BHD = qkv_BX.view(-1, H + 2 * K, D)
    q_BHD, k_BKD, v_BKD = x_BHD.split((H, K, K), 1)
    if norms is not None:
        q_BHD, k_BKD = normed(q_BHD, norms[0], epsilon), normed(k_BKD, norms[1], epsilon)
    q_BHD, k_BKD = rotated(q_BHD, cos_B1D, sin_B1D), rotated(k_BKD, cos_B1D, sin_B1D)
    return q_BHD.reshape(-1, K, H // K, D), k_BKD[:, :, None], v_BKD[:, :, None]


def gated(gate_up_BX: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) · up."""
    gate_BF, up_BF = gate_up_BX.chunk(2, -1)
    return activation(gate_BF) * up_BF


class _Joined(nn.Module):
    """Outputs side by side where the products could not be joined."""

    def __init__(self, linears: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] → […, all O]."""
        return torch.cat([linear(x) for linear in self.linears], -1)


class _LeanBlock:
    def __init__(self, block: Block, keys: Tensor, values: Tensor, join: bool) -> None:
        self.parts, self.window = block, block.window
        self.qkv = (joined(block.qkv) if join else None) or _Joined(block.qkv)
        self.gate_up = (joined(block.gate_up) if join else None) or _Joined(block.gate_up)
        self.keys, self.values = keys, values
        self.head_norms, self.head_epsilon = None, 0.0
        if block.head_norms is not None:
            first, second = block.head_norms
            self.head_norms = (first.weight, second.weight)
            self.head_epsilon = first.epsilon


class LeanStep:
    """A step over the static cache of one decoder.

    Args:
        parts: Of the model.
        cache: Whose tensors are read and written; its first rows, where a step has fewer.
        join: Whether linears of one input are multiplied as one.

    Attributes:
        kernels: What lies between products, in kernels of our own; None for PyTorch's operations.
        no_kernels: Why there are none on a device that could have them.
    """

    name = "the lean step"

    def __init__(self, parts: Parts, cache: StaticCache, *, join: bool = True) -> None:
        self.parts = parts
        self.blocks = [
            _LeanBlock(block, part.keys, part.values, join)
            for block, part in zip(parts.blocks, cache.parts, strict=True)
        ]
        like = parts.norm.weight
        self.cos_ND, self.sin_ND = parts.angles(cache.capacity, like)
        self.heads = (parts.heads, parts.kv_heads, parts.head_dim)
        self.kernels, self.no_kernels = None, None
        if like.is_cuda:
            self.kernels, self.no_kernels = _kernels(self.heads[2], self.cos_ND)
        self.silu = _is_silu(parts.activation)
        pairs = cache.parts[0].keys.shape[0] * parts.kv_heads
        self.done_P = torch.zeros(pairs, dtype=torch.int32, device=like.device)

    def at(self, ids_B: Tensor, length: int, pad_B: Tensor | None) -> Tensor:
        """Logits [B, V] of ids at position `length`, known to the host."""
        if pad_B is None:
            cos_B1D, sin_B1D = self.cos_ND[length][None, None], self.sin_ND[length][None, None]
        else:
            place_B = length - pad_B
            cos_B1D, sin_B1D = self.cos_ND[place_B][:, None], self.sin_ND[place_B][:, None]
        rows = len(ids_B)

        def attend(block: _LeanBlock, qkv_BX: Tensor) -> Tensor:
            q, k, v = self._split(block, qkv_BX, cos_B1D, sin_B1D)
            keys, values = block.keys[:rows], block.values[:rows]
            keys[:, :, length : length + 1] = k
            values[:, :, length : length + 1] = v
            first = 0 if block.window is None else max(0, length + 1 - block.window)
            mask = None
            if pad_B is not None:
                columns_N = torch.arange(first, length + 1, device=pad_B.device)
                mask = (columns_N >= pad_B[:, None])[:, None, None]
            seen = slice(first, length + 1)
            return self._attention(q, keys[:, :, seen], values[:, :, seen], mask)

        return self._run(ids_B, attend)

    def at_slot(self, ids_B: Tensor, slot_1: Tensor, seen: int, pad_B: Tensor) -> Tensor:
        """The same at a place that only the device knows; attention reads `seen` positions."""
        if self.kernels is not None:
            return self._run(ids_B, self._by_kernels(slot_1, pad_B))
        place_B = slot_1 - pad_B
        cos_B1D, sin_B1D = self.cos_ND[place_B][:, None], self.sin_ND[place_B][:, None]
        columns_N = torch.arange(seen, device=ids_B.device)
        valid_BN = (columns_N <= slot_1) & (columns_N >= pad_B[:, None])
        masks: dict[int | None, Tensor] = {}
        rows = len(ids_B)

        def attend(block: _LeanBlock, qkv_BX: Tensor) -> Tensor:
            q, k, v = self._split(block, qkv_BX, cos_B1D, sin_B1D)
            keys, values = block.keys[:rows], block.values[:rows]
            keys.index_copy_(2, slot_1, k)
            values.index_copy_(2, slot_1, v)
            if block.window not in masks:
                within = valid_BN
                if block.window is not None:
                    within = within & (columns_N > slot_1 - block.window)
                masks[block.window] = within[:, None, None]
            mask = masks[block.window]
            return self._attention(q, keys[:, :, :seen], values[:, :, :seen], mask)

        return self._run(ids_B, attend)

    def prompt(
        self, ids_BT: Tensor, length: int, pad_B: Tensor | None, last_B: Tensor | None = None
    ) -> Tensor:
        """Logits [B, V] of each row's last id, or of the ids at `last_B` of all B T.

        The first ids of the rows stand at position `length`.
        """
        B, T = ids_BT.shape
        H, K, D = self.heads
        seen, slot_1 = length + T, ids_BT.new_full((1,), length)
        pads_B = ids_BT.new_zeros(B) if pad_B is None else pad_B
        place_M = (slot_1 + torch.arange(T, device=ids_BT.device) - pads_B[:, None]).flatten()
        masks: dict[int | None, Tensor | None] = {}

        def attend(block: _LeanBlock, qkv_MX: Tensor) -> Tensor:
            keys, values = block.keys[:B], block.values[:B]
            if self.kernels is not None:
                q_MHD = self._stored(block, qkv_MX, slot_1, pads_B)
            else:
                place_M0 = place_M.clamp(min=0)  # padding has none
                cos_M1D, sin_M1D = self.cos_ND[place_M0][:, None], self.sin_ND[place_M0][:, None]
                q, k, v = self._split(block, qkv_MX, cos_M1D, sin_M1D)
                keys[:, :, length:seen] = k.view(B, T, K, D).transpose(1, 2)
                values[:, :, length:seen] = v.view(B, T, K, D).transpose(1, 2)
                q_MHD = q.reshape(-1, H, D)
            window = None if block.window is None or block.window >= seen else block.window
            if window not in masks:
                masks[window] = _prompt_mask(length, T, pad_B, window, ids_BT.device)
            q_BHTD = q_MHD.view(B, T, H, D).transpose(1, 2)
            o_BHTD = _prompt_attention(
                q_BHTD, keys[:, :, :seen], values[:, :, :seen], masks[window], self.parts.scale
            )
            return o_BHTD.transpose(1, 2).reshape(B * T, H * D)

        return self._run(
            ids_BT.flatten(), attend, slice(T - 1, None, T) if last_B is None else last_B
        )

    def likeliest(self, logits_BV: Tensor) -> Tensor:
        """The ids [B] of the largest logits."""
        if self.kernels is None:
            return logits_BV.argmax(-1)
        return self.kernels.likeliest(logits_BV, self.done_P)

    def _by_kernels(self, slot_1: Tensor, pad_B: Tensor) -> Callable[[_LeanBlock, Tensor], Tensor]:
        kernels: Any = self.kernels

        def attend(block: _LeanBlock, qkv_BX: Tensor) -> Tensor:
            q_BHD = self._stored(block, qkv_BX, slot_1, pad_B)
            return kernels.attend(
                q_BHD, block.keys, block.values, slot_1, pad_B, self.parts.scale, block.window,
                self.done_P,
            )  # fmt: skip

        return attend

    def _stored(self, block: _LeanBlock, qkv_MX: Tensor, slot_1: Tensor, pad_B: Tensor) -> Tensor:
        """Queries [M, H, D]; keys and values lie in the cache then."""
        kernels: Any = self.kernels
        return kernels.rotate_and_store(
            qkv_MX, (self.cos_ND, self.sin_ND), block.head_norms, block.head_epsilon,
            self.heads, block.keys, block.values, slot_1, pad_B,
        )  # fmt: skip

    def _split(
        self, block: _LeanBlock, qkv_BX: Tensor, cos_B1D: Tensor, sin_B1D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(
            qkv_BX, cos_B1D, sin_B1D, block.head_norms, block.head_epsilon, self.heads
        )

    def _run(
        self,
        ids_B: Tensor,
        attend: Callable[[_LeanBlock, Tensor], Tensor],
        last: slice | Tensor | None = None,
    ) -> Tensor:
        """Logits of all ids, or of some: then nothing behind the last attention sees the others."""
        parts, kernels = self.parts, self.kernels
        norm, add = (normed, added_norm) if kernels is None else (kernels.norm, kernels.added_norm)
        x_BC = parts.embedding(ids_B)
        first = parts.blocks[0].attention_norm
        h_BC = norm(x_BC, first.weight, first.epsilon)
        norms = [block.attention_norm for block in parts.blocks[1:]] + [parts.norm]
        for block, after in zip(self.blocks, norms, strict=True):
            o_BX = attend(block, block.qkv(h_BC))
            if last is not None and block is self.blocks[-1]:
                o_BX, x_BC = o_BX[last], x_BC[last]
            y_BC = block.parts.output(o_BX)
            mlp = block.parts.mlp_norm
            x_BC, h_BC = add(x_BC, y_BC, mlp.weight, mlp.epsilon)
            y_BC = block.parts.down(self._gated(block.gate_up(h_BC)))
            x_BC, h_BC = add(x_BC, y_BC, after.weight, after.epsilon)
        return parts.head(h_BC)

    def _gated(self, gate_up_BX: Tensor) -> Tensor:
        if self.kernels is not None and self.silu:
            return self.kernels.gated(gate_up_BX)
        return gated(gate_up_BX, self.parts.activation)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, K, G, D] over [B, K, N, D] → [B, H · D]; the heads of a group are its queries."""
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.parts.scale)
        return o.reshape(o.shape[0], -1)


def _prompt_mask(
    length: int, tokens: int, pad_B: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Which positions a token sees [B or 1, 1, T, N]; None where all up to its own, no padding."""
    if pad_B is None and window is None:
        return None
    columns_N = torch.arange(length + tokens, device=device)
    own_T1 = columns_N[length:, None]
    seen = columns_N <= own_T1
    if window is not None:
        seen = seen & (columns_N > own_T1 - window)
    if pad_B is not None:  # a token of the padding sees itself: nothing would be no number
        seen = seen & ((columns_N >= pad_B[:, None, None]) | (columns_N == own_T1))
    return seen.view(-1, 1, tokens, length + tokens)


def _prompt_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, T, D] over [B, K, N, D], of which the last T are the queries' own."""
    first = q.shape[2] == k.shape[2]
    if mask is None and first:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    G = q.shape[1] // k.shape[1]  # fast kernels with masks take no groups
    k, v = (x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))
    bias = causal_lower_right(q.shape[2], k.shape[2]) if mask is None else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _is_silu(function: Callable[[Tensor], Tensor]) -> bool:
    """Found by trying."""
    x = torch.linspace(-6, 6, 64)
    return torch.allclose(function(x), F.silu(x), atol=1e-6)


def _kernels(head_dim: int, cos_ND: Tensor) -> tuple[Any, str | None]:
    """The module of Triton kernels, or None and why they do not serve."""
    try:
        from pocketlm.runtime import decode_kernels
    except ImportError as error:
        return None, f"needs Triton ({error})"
    refused = decode_kernels.refuses(head_dim, cos_ND.shape[-1], cos_ND.dtype)
    return (decode_kernels if refused is None else None), refused


def lean_steps(
    model: PreTrainedModel, cache: StaticCache, rows: int
) -> Iterator[LeanStep | NativeStep | str]:
    """Steps to try, the fastest first; between them, why one is not there."""
    from pocketlm.models.decoder_parts import decoder_parts

    parts = decoder_parts(model)
    if isinstance(parts, str):
        yield f"steps run through transformers' forward: {parts}."
        return
    join = True
    if model.device.type == "cpu":
        from pocketlm.runtime.native.step import ROWS, native_step

        step = native_step(parts, cache, rows)
        yield f"no step in C: {step}." if isinstance(step, str) else step
        join = rows <= ROWS  # with more, a product's time is its arithmetic
    lean = LeanStep(parts, cache, join=join)
    if lean.no_kernels is not None:
        yield f"attention, norms and gates run through PyTorch's operations: {lean.no_kernels}."
    yield lean
