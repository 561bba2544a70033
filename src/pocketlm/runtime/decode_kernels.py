"""Triton kernels of one decoding step's attention: rotation and writing of keys and values in one,
attention split over positions in two.

At one token PyTorch's attention has one program for each head of keys, eight in a Llama-3-8B, on
over a hundred processors; and rotation, its copies and the writes are eight launches. Positions
that count are known on the device alone (`slot`): programs read as far as that and no further, so
that one CUDA graph serves a cache of any filling.

Attention over parts of the positions and their sum by running maxima: FlashAttention-2
(arXiv:2307.08691), and its split over keys for decoding.

Legend: B rows, H heads of queries, K of keys, G = H / K, D width, R rotated width, N positions.
"""

# pyright: reportIndexIssue=false, reportMissingImports=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 32  # positions that a program reads at once
DOT_ROWS = 16  # the least that tensor cores take
PROGRAMS = 256  # wanted at least: two for each processor of a large GPU


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, q_weight, k_weight, slot, pad, q_out, keys, values,
    k_row, k_head, k_place, v_row, v_head, v_place, epsilon,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(slot)
    d = tl.arange(0, D)
    source = qkv + (row * (H + 2 * K) + head) * D
    x = tl.load(source + d).to(tl.float32)
    if head < H + K:
        half: tl.constexpr = R // 2
        partner = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
        other = tl.load(source + partner).to(tl.float32)
        if NORMED:
            inverse = tl.rsqrt(tl.sum(x * x) / D + epsilon)
            is_q = head < H
            w = tl.where(is_q, tl.load(q_weight + d), tl.load(k_weight + d)).to(tl.float32)
            w_other = tl.where(is_q, tl.load(q_weight + partner), tl.load(k_weight + partner))
            x = x * inverse * w
            other = other * inverse * w_other.to(tl.float32)
        angle = (place - tl.load(pad + row)) * R + d
        c = tl.load(cos + angle, mask=d < R, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=d < R, other=0.0).to(tl.float32)
        x = x * c + tl.where(d < half, -other, other) * s
    if head < H:
        tl.store(q_out + (row * H + head) * D + d, x)
    elif head < H + K:
        tl.store(keys + row * k_row + (head - H) * k_head + place * k_place + d, x)
    else:
        tl.store(values + row * v_row + (head - H - K) * v_head + place * v_place + d, x)


@triton.jit
def _attend_part(
    q, keys, values, slot, pad, part, top, total,
    k_row, k_head, k_place, v_row, v_head, v_place, scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // K, pair % K
    stop = tl.load(slot) + 1
    first = tl.load(pad + row)
    if WINDOW > 0:
        first = tl.maximum(first, stop - WINDOW)
    chunk = tl.cdiv(tl.cdiv(stop - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, stop)
    g, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    q_GD = tl.load(q + (pair * G + g[:, None]) * D + d[None, :], mask=g[:, None] < G, other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sum_GD = tl.zeros([ROWS, D], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + n
        inside = at < end
        k_DN = tl.load(
            keys + row * k_row + head * k_head + at[None, :] * k_place + d[:, None],
            mask=inside[None, :],
            other=0.0,
        )
        v_ND = tl.load(
            values + row * v_row + head * v_head + at[:, None] * v_place + d[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        score = tl.where(
            inside[None, :], tl.dot(q_GD, k_DN, input_precision="ieee") * scale, float("-inf")
        )
        higher = tl.maximum(maximum, tl.max(score, 1))
        fade = tl.exp(maximum - higher)
        p = tl.exp(score - higher[:, None])
        weight = weight * fade + tl.sum(p, 1)
        sum_GD = sum_GD * fade[:, None] + tl.dot(p.to(v_ND.dtype), v_ND, input_precision="ieee")
        maximum = higher
    line = (pair * SPLITS + split) * G + g
    tl.store(part + line[:, None] * D + d[None, :], sum_GD, mask=g[:, None] < G)
    tl.store(top + line, maximum, mask=g < G)
    tl.store(total + line, weight, mask=g < G)


@triton.jit
def _join_parts(
    part, top, total, out, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    pair, g = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    line = (pair * SPLITS + s) * G + g
    maximum = tl.load(top + line)
    share = tl.exp(maximum - tl.max(maximum, 0))
    sum_SD = tl.load(part + line[:, None] * D + d[None, :]) * share[:, None]
    weight = tl.sum(tl.load(total + line) * share, 0)
    tl.store(out + (pair * G + g) * D + d, tl.sum(sum_SD, 0) / weight)


def refuses(head_dim: int, rotated: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take heads of this kind; None where they can."""
    if head_dim & (head_dim - 1) or head_dim < 16:
        return f"heads of {head_dim} are no power of two from 16"
    if rotated % 2 or rotated > head_dim:
        return f"{rotated} rotated widths are no even part of {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} is not multiplied"
    return None


def rotate_and_store(
    qkv_BX: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    heads: tuple[int, int, int],
    keys_BKND: Tensor,
    values_BKND: Tensor,
    slot_1: Tensor,
    pad_B: Tensor,
) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values at `slot`.

    Args:
        qkv_BX: The joined product, X = (H + 2 K) · D.
        angles: Cosines and sines [N, R].
        norms: Weights [D] of queries and keys, or None.
        epsilon: Of these norms.
        heads: H, K, D.
        keys_BKND: Of the cache; written.
        values_BKND: The same.
        slot_1: The place, int64 on the device.
        pad_B: Padding on the left of each row, int64.

    Returns:
        The queries [B, H, D].
    """
    H, K, D = heads
    rows = qkv_BX.shape[0]
    q_BHD = qkv_BX.new_empty(rows, H, D)
    q_weight, k_weight = norms or (qkv_BX, qkv_BX)  # not read without norms
    _rotate_and_store[rows, H + 2 * K](
        qkv_BX.contiguous(), *angles, q_weight, k_weight, slot_1, pad_B, q_BHD,
        keys_BKND, values_BKND, *keys_BKND.stride()[:3], *values_BKND.stride()[:3], epsilon,
        H, K, D, angles[0].shape[-1], norms is not None, num_warps=1,
    )  # fmt: skip
    return q_BHD


def attend(
    q_BHD: Tensor,
    keys_BKND: Tensor,
    values_BKND: Tensor,
    slot_1: Tensor,
    pad_B: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of one token over the cache's positions from `pad` to `slot`.

    Args:
        q_BHD: Queries.
        keys_BKND: Of the cache.
        values_BKND: The same.
        slot_1: The last position that counts, int64 on the device.
        pad_B: The first one of each row, int64.
        scale: Of scores.
        window: The most positions that count; None for all.

    Returns:
        [B, H · D].
    """
    B, H, D = q_BHD.shape
    K, N = keys_BKND.shape[1], keys_BKND.shape[2]
    G = H // K
    splits = _splits(B * K, N)
    part = torch.empty(B * K, splits, G, D, dtype=torch.float32, device=q_BHD.device)
    top = torch.empty(2, B * K, splits, G, dtype=torch.float32, device=q_BHD.device)
    out_BX = torch.empty(B, H * D, dtype=q_BHD.dtype, device=q_BHD.device)
    rows = max(DOT_ROWS, triton.next_power_of_2(G))
    _attend_part[B * K, splits](
        q_BHD, keys_BKND, values_BKND, slot_1, pad_B, part, top[0], top[1],
        *keys_BKND.stride()[:3], *values_BKND.stride()[:3], scale,
        K, G, D, splits, window or 0, BLOCK_N, rows,
    )  # fmt: skip
    _join_parts[B * K, G](part, top[0], top[1], out_BX, G, D, splits, num_warps=1)
    return out_BX


def _splits(pairs: int, capacity: int) -> int:
    """Parts of the positions, a power of two: enough programs, none without a block to read."""
    wanted = triton.next_power_of_2(max(1, PROGRAMS // pairs))
    return max(1, min(wanted, 64, triton.next_power_of_2(triton.cdiv(capacity, BLOCK_N))))
