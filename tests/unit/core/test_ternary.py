"""Three levels: the scale that is best of all, tried one by one."""

from __future__ import annotations

import torch

from pocketlm.core.ternary import to_ternary


def test_no_scale_is_better() -> None:
    weight_OI = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = to_ternary(weight_OI, 16, torch.float32)
    assert found.codes_OI.abs().max() == 1
    error = (weight_OI - found.dequantize(torch.float64)).square().view(12, 16).sum(1)
    blocks = weight_OI.view(12, 16)
    for scale in torch.linspace(0.01, 3, 600, dtype=torch.float64):
        levels = torch.stack([torch.zeros_like(blocks), blocks.sign() * scale])
        other = (blocks - levels).square().min(0).values.sum(1)
        assert (error <= other + 1e-6).all()


def test_three_levels_come_back_and_zeros_stay() -> None:
    codes_OI = torch.tensor([[1, -1, 0, 1, 0, 0, 0, 0]])
    found = to_ternary(codes_OI * 0.75, 4, torch.float16)
    assert torch.equal(found.dequantize(), codes_OI * 0.75)
    assert found.scale_OG.tolist() == [[0.75, 0.0]]
