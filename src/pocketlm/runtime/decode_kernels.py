"""Triton kernels of what lies between products, in a decoding step and, but for attention, in a
prompt: norms with the residual, the gate, rotation and writing of keys and values, attention split
over positions.

At one token PyTorch's attention has one program for each head of keys, eight in a Llama-3-8B, on
over a hundred processors; and rotation, its copies and the writes are eight launches. Positions
that count are known on the device alone (`slot`): programs read as far as that and no further, so
that one CUDA graph serves a cache of any filling.

On Hopper a kernel lets the one behind it start at once, and waits itself for the one before
(programmatic dependent launch): the next product's weights come in while these compute.

Attention over parts of the positions and their sum by running maxima: FlashAttention-2
(arXiv:2307.08691), and its split over keys for decoding; the last program of a head adds the parts.

Legend: B rows, T tokens of a row (of a step one), M = B T, H heads of queries, K of keys,
G = H / K, D width, R rotated width, N positions, C hidden width, F width of the gate, V vocabulary.
"""

# pyright: reportIndexIssue=false, reportMissingImports=false, reportOptionalCall=false
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None

# Of an H100's step at batch 1, in ms: 2.166 so, 2.236 with attention too, 2.325 with none.
OVERLAPPED = frozenset({"norm", "gate", "rotate", "likeliest"})
BLOCK_F = 1024  # values of the gate that a program makes
BLOCK_V = 2048  # logits that a program compares
BLOCK_N = 32  # positions that a program reads at once
DOT_ROWS = 16  # the least that tensor cores take
PROGRAMS = 256  # wanted at least: two for each processor of a large GPU


@triton.jit
def _overlap():
    """Lets the kernel behind this one start, and waits for the one before."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def _add_norm(
    x, y, weight, x_out, h_out, columns, epsilon,
    ADD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    inside = c < columns
    at = tl.program_id(0).to(tl.int64) * columns + c
    w = tl.load(weight + c, mask=inside, other=0.0)
    if EARLY:
        _overlap()
    v = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(y + at, mask=inside, other=0.0)
        v = (v.to(tl.float32) + added.to(tl.float32)).to(v.dtype)
        tl.store(x_out + at, v, mask=inside)
    v = v.to(tl.float32)
    h = (v * tl.rsqrt(tl.sum(v * v) / columns + epsilon)).to(w.dtype)
    tl.store(h_out + at, h.to(tl.float32) * w.to(tl.float32), mask=inside)


@triton.jit
def _gate(gate_up, out, columns, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        _overlap()
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    gate = tl.load(gate_up + row * 2 * columns + c, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * columns + c, mask=inside, other=0.0)
    opened = (gate.to(tl.float32) * tl.sigmoid(gate.to(tl.float32))).to(gate.dtype)
    tl.store(out + row * columns + c, opened.to(tl.float32) * up.to(tl.float32), mask=inside)


@triton.jit
def _likeliest(
    logits, best, place, done, out, width,
    PARTS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        _overlap()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * width + at, mask=at < width, other=float("-inf"))
    top, first = tl.max(value.to(tl.float32), 0, return_indices=True)
    tl.store(best + row * PARTS + part, top)
    tl.store(place + row * PARTS + part, part * BLOCK + first)
    tl.debug_barrier()
    if tl.atomic_add(done + row, 1) == PARTS - 1:  # the others' results are there
        tl.debug_barrier()
        p = tl.arange(0, ALL)
        tops = tl.load(
            best + row * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg"
        )
        _, which = tl.max(tops, 0, return_indices=True)
        tl.store(out + row, tl.load(place + row * PARTS + which, cache_modifier=".cg"))
        tl.store(done + row, 0)  # for the next launch


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, q_weight, k_weight, slot, pad, q_out, keys, values,
    tokens, k_row, k_head, k_place, v_row, v_head, v_place, epsilon,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        _overlap()
    line, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = line // tokens
    place = tl.load(slot) + line % tokens
    d = tl.arange(0, D)
    source = qkv + (line * (H + 2 * K) + head) * D
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
        angle = tl.maximum(place - tl.load(pad + row), 0) * R + d
        c = tl.load(cos + angle, mask=d < R, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=d < R, other=0.0).to(tl.float32)
        x = x * c + tl.where(d < half, -other, other) * s
    if head < H:
        tl.store(q_out + (line * H + head) * D + d, x)
    elif head < H + K:
        tl.store(keys + row * k_row + (head - H) * k_head + place * k_place + d, x)
    else:
        tl.store(values + row * v_row + (head - H - K) * v_head + place * v_place + d, x)


@triton.jit
def _attend(
    q, keys, values, slot, pad, part, top, total, done, out,
    k_row, k_head, k_place, v_row, v_head, v_place, scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        _overlap()
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
    if SPLITS == 1:
        at_GD = (pair * G + g)[:, None] * D + d[None, :]
        tl.store(out + at_GD, sum_GD / weight[:, None], mask=g[:, None] < G)
    else:
        line = (pair * SPLITS + split) * G + g
        tl.store(part + line[:, None] * D + d[None, :], sum_GD, mask=g[:, None] < G)
        tl.store(top + line, maximum, mask=g < G)
        tl.store(total + line, weight, mask=g < G)
        tl.debug_barrier()
        if tl.atomic_add(done + pair, 1) == SPLITS - 1:  # the others' parts are there
            tl.debug_barrier()
            s = tl.arange(0, SPLITS)
            for one in tl.static_range(G):
                line_S = (pair * SPLITS + s) * G + one
                part_SD = tl.load(part + line_S[:, None] * D + d[None, :], cache_modifier=".cg")
                top_S = tl.load(top + line_S, cache_modifier=".cg")
                total_S = tl.load(total + line_S, cache_modifier=".cg")
                share_S = tl.exp(top_S - tl.max(top_S, 0))
                mean_D = tl.sum(part_SD * share_S[:, None], 0) / tl.sum(total_S * share_S, 0)
                tl.store(out + (pair * G + one) * D + d, mean_D)
            tl.store(done + pair, 0)  # for the next launch


@lru_cache(maxsize=16)
def _starts_early(device: torch.device) -> bool:
    """Whether kernels overlap there: from Hopper on."""
    if gdc_wait is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _options(x: Tensor, kernel: str) -> dict[str, Any]:
    early = kernel in OVERLAPPED and _starts_early(x.device)
    return {"EARLY": early, "launch_pdl": True} if early else {"EARLY": False}


def norm(x_BC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
    """RMS norm: x / rms(x) in float32, times the weight in the weight's dtype; [B, C]."""
    h_BC = torch.empty_like(x_BC)
    _launch_norm(x_BC, None, weight_C, epsilon, x_BC, h_BC)
    return h_BC


def added_norm(
    x_BC: Tensor, y_BC: Tensor, weight_C: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm; each [B, C]."""
    sum_BC, h_BC = torch.empty_like(x_BC), torch.empty_like(x_BC)
    _launch_norm(x_BC, y_BC, weight_C, epsilon, sum_BC, h_BC)
    return sum_BC, h_BC


def _launch_norm(
    x_BC: Tensor,
    y_BC: Tensor | None,
    weight_C: Tensor,
    epsilon: float,
    sum_BC: Tensor,
    h_BC: Tensor,
) -> None:
    rows, columns = x_BC.shape
    block = triton.next_power_of_2(columns)
    _add_norm[rows,](
        x_BC.contiguous(), x_BC if y_BC is None else y_BC.contiguous(), weight_C, sum_BC, h_BC,
        columns, epsilon, y_BC is not None, block, num_warps=min(16, max(1, block // 256)),
        **_options(x_BC, "norm"),
    )  # fmt: skip


def gated(gate_up_BX: Tensor) -> Tensor:
    """silu(gate) · up [B, F] of both, side by side [B, 2 F]."""
    rows, columns = gate_up_BX.shape[0], gate_up_BX.shape[1] // 2
    out_BF = gate_up_BX.new_empty(rows, columns)
    _gate[rows, triton.cdiv(columns, BLOCK_F)](
        gate_up_BX.contiguous(), out_BF, columns, BLOCK_F, **_options(gate_up_BX, "gate")
    )
    return out_BF


def refuses(head_dim: int, rotated: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take heads of this kind; None where they can."""
    if head_dim & (head_dim - 1) or head_dim < 16:
        return f"heads of {head_dim} are no power of two from 16"
    if rotated % 2 or rotated > head_dim:
        return f"{rotated} rotated widths are no even part of {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} is not multiplied"
    return None


def likeliest(logits_BV: Tensor, done_P: Tensor) -> Tensor:
    """The index of each row's largest value, the first of equal ones; int64 [B].

    Args:
        logits_BV: A row for each sequence.
        done_P: Zeros, int32, at least B; zeros again when it has ended.
    """
    rows, width = logits_BV.shape
    parts = triton.cdiv(width, BLOCK_V)
    best_BP = torch.empty(rows, parts, dtype=torch.float32, device=logits_BV.device)
    place_BP = torch.empty(rows, parts, dtype=torch.int32, device=logits_BV.device)
    out_B = torch.empty(rows, dtype=torch.long, device=logits_BV.device)
    _likeliest[rows, parts](
        logits_BV.contiguous(), best_BP, place_BP, done_P, out_B, width,
        parts, triton.next_power_of_2(parts), BLOCK_V, **_options(logits_BV, "likeliest"),
    )  # fmt: skip
    return out_B


def rotate_and_store(
    qkv_MX: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    heads: tuple[int, int, int],
    keys_BKND: Tensor,
    values_BKND: Tensor,
    slot_1: Tensor,
    pad_B: Tensor,
) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values from `slot` on.

    Args:
        qkv_MX: The joined product of M = B T tokens, X = (H + 2 K) · D.
        angles: Cosines and sines [N, R].
        norms: Weights [D] of queries and keys, or None.
        epsilon: Of these norms.
        heads: H, K, D.
        keys_BKND: Of the cache; written.
        values_BKND: The same.
        slot_1: The place of a row's first token, int64 on the device.
        pad_B: Padding on the left of each row, int64.

    Returns:
        The queries [M, H, D].
    """
    H, K, D = heads
    lines = qkv_MX.shape[0]
    q_MHD = qkv_MX.new_empty(lines, H, D)
    q_weight, k_weight = norms or (qkv_MX, qkv_MX)  # not read without norms
    _rotate_and_store[lines, H + 2 * K](
        qkv_MX.contiguous(), *angles, q_weight, k_weight, slot_1, pad_B, q_MHD,
        keys_BKND, values_BKND, lines // len(pad_B),
        *keys_BKND.stride()[:3], *values_BKND.stride()[:3], epsilon,
        H, K, D, angles[0].shape[-1], norms is not None, num_warps=1, **_options(qkv_MX, "rotate"),
    )  # fmt: skip
    return q_MHD


def attend(
    q_BHD: Tensor,
    keys_BKND: Tensor,
    values_BKND: Tensor,
    slot_1: Tensor,
    pad_B: Tensor,
    scale: float,
    window: int | None,
    done_P: Tensor,
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
        done_P: Zeros, int32 for each of P = B K heads of keys; zeros again when it has ended.

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
    _attend[B * K, splits](
        q_BHD, keys_BKND, values_BKND, slot_1, pad_B, part, top[0], top[1], done_P, out_BX,
        *keys_BKND.stride()[:3], *values_BKND.stride()[:3], scale,
        K, G, D, splits, window or 0, BLOCK_N, max(DOT_ROWS, triton.next_power_of_2(G)),
        **_options(q_BHD, "attend"),
    )  # fmt: skip
    return out_BX


def _splits(pairs: int, capacity: int) -> int:
    """Parts of the positions, a power of two: enough programs, none without a block to read."""
    wanted = triton.next_power_of_2(max(1, PROGRAMS // pairs))
    return max(1, min(wanted, 64, triton.next_power_of_2(triton.cdiv(capacity, BLOCK_N))))
