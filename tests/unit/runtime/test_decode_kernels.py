"""The kernels of a decoding step against plain PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
import random

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from pocketlm.runtime import decode_kernels as kernels
from pocketlm.runtime import lean

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts a float off to bfloat16 where a GPU rounds it.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    error = (found.double() - truth.double()).norm() / truth.double().norm()
    return bool(error < TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 160), (2, 576)])
def test_norm_with_the_residual(rows: int, columns: int, dtype: torch.dtype) -> None:
    x_BC, y_BC = normal(rows, columns, dtype=dtype), normal(rows, columns, 1, dtype=dtype)[..., 0]
    weight_C = normal(columns, dtype=dtype)
    truth_BC = lean.normed(x_BC.double(), weight_C.double(), 1e-5)
    assert close(kernels.norm(x_BC, weight_C, 1e-5), truth_BC)
    sum_BC, h_BC = kernels.added_norm(x_BC, y_BC, weight_C, 1e-5)
    assert torch.equal(sum_BC, x_BC + y_BC)
    assert close(h_BC, lean.normed(sum_BC.double(), weight_C.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (3, 1100)])
def test_gate(rows: int, columns: int, dtype: torch.dtype) -> None:
    both_BX = normal(rows, 2 * columns, dtype=dtype)
    truth_BF = lean.gated(both_BX.double(), torch.nn.functional.silu)
    assert close(kernels.gated(both_BX), truth_BF)


@pytest.mark.parametrize("width", [5, 2048, 5000])
def test_likeliest(width: int) -> None:
    logits_BV, done_P = normal(3, width), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    logits_BV[1, width // 3] = logits_BV[1, -1] = 9.0  # equal ones: the first
    for _ in range(2):
        assert kernels.likeliest(logits_BV, done_P).tolist() == logits_BV.argmax(-1).tolist()
        assert not done_P.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_parts(dtype: torch.dtype) -> None:
    draw = random.Random(1)
    for _ in range(4):
        B, K, G = draw.choice((1, 3)), draw.choice((1, 2)), draw.choice((1, 3, 4))
        D, N = draw.choice((16, 32)), draw.choice((64, 300))
        place, window = draw.randrange(8, N), draw.choice((None, 7, 40))
        q = normal(B, K * G, D, dtype=dtype)
        keys, values = normal(B, K, N, D, dtype=dtype), normal(B, K, N, D, 1, dtype=dtype)[..., 0]
        slot, pad = torch.tensor([place], device=DEVICE), torch.arange(B, device=DEVICE)
        done_P = torch.zeros(B * K, dtype=torch.int32, device=DEVICE)
        out = kernels.attend(q, keys, values, slot, pad, D**-0.5, window, done_P)
        at = torch.arange(N, device=DEVICE)
        mask = (at <= place) & (at >= pad[:, None])
        if window is not None:
            mask &= at > place - window
        truth = torch.nn.functional.scaled_dot_product_attention(
            q.view(B, K, G, D).double(),
            keys.double(),
            values.double(),
            attn_mask=mask[:, None, None],
        )
        assert close(out, truth.reshape(B, -1)), (B, K, G, D, N, place, window)
        assert not done_P.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens", "place"), [(3, 1, 9), (1, 5, 0), (2, 4, 3)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_of_steps_and_prompts(
    rows: int, tokens: int, place: int, normed: bool, dtype: torch.dtype
) -> None:
    H, K, D, R, N = 4, 2, 16, 8, 12
    qkv = normal(rows * tokens, (H + 2 * K) * D, dtype=dtype)
    cos, sin = normal(N, R, dtype=dtype), normal(N, R, 1, dtype=dtype)[..., 0]
    keys, values = normal(rows, K, N, D, dtype=dtype), normal(rows, K, N, D, 1, dtype=dtype)[..., 0]
    expected_k, expected_v = keys.clone(), values.clone()
    norms = (normal(D, dtype=dtype), normal(D, 1, dtype=dtype)[..., 0]) if normed else None
    slot, pad = torch.tensor([place], device=DEVICE), torch.arange(rows, device=DEVICE)
    q = kernels.rotate_and_store(qkv, (cos, sin), norms, 1e-6, (H, K, D), keys, values, slot, pad)
    at = torch.arange(place, place + tokens, device=DEVICE)
    angle = (at - pad[:, None]).clamp(min=0).flatten()
    truth_q, k, v = lean.split_heads(
        qkv.double(), cos.double()[angle][:, None], sin.double()[angle][:, None],
        None if norms is None else (norms[0].double(), norms[1].double()), 1e-6, (H, K, D),
    )  # fmt: skip
    shape = (rows, tokens, K, D)
    expected_k[:, :, at] = k.reshape(shape).transpose(1, 2).to(dtype)
    expected_v[:, :, at] = v.reshape(shape).transpose(1, 2).to(dtype)
    assert torch.equal(values, expected_v)
    assert close(keys, expected_k)
    assert close(q, truth_q.reshape(q.shape))
