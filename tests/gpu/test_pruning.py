"""2:4 on sparse tensor cores gives the dense product; steps on a GPU keep exactly what they say."""

from __future__ import annotations

import pytest
import torch
from tests.unit.prune.linears import SumOfLinears, inputs, statistics, weight
from torch import nn

from pocketlm.core.state import LinearState
from pocketlm.core.stored import SparsitySpec
from pocketlm.core.tensors import Dense, Sparse
from pocketlm.prune.besa import learned_shares
from pocketlm.prune.patterns import kept
from pocketlm.prune.steps import Wanda
from pocketlm.prune.updates import Alps, Sparsegpt
from pocketlm.runtime.semi_structured import make_sparse, refuses

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sparse_product_is_the_dense_one(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    weight_OI = torch.randn(128, 256, device=device, dtype=dtype)
    mask_OI = kept(weight_OI.abs().float(), SparsitySpec.read("2:4"))
    sparse = Sparse(Dense((weight_OI * mask_OI).cpu()), mask_OI.cpu(), (2, 4))
    assert refuses(sparse, dtype, device) is None
    linear = nn.Linear(256, 128, bias=False, device=device, dtype=dtype)
    linear.weight = nn.Parameter(weight_OI * mask_OI, requires_grad=False)
    x = torch.randn(2, 32, 256, device=device, dtype=dtype)
    expected = linear(x)
    torch.testing.assert_close(make_sparse(linear)(x), expected, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("step_class", [Wanda, Sparsegpt, Alps])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_devices_agree(step_class: type[Wanda], sparsity: str) -> None:
    step, masks = step_class.parse({"sparsity": sparsity}), []
    for device in ("cpu", "cuda"):
        stats = statistics(inputs(400, 64), device)
        state = LinearState("x", weight(48, 64).to(device), None, torch.float16)
        after = step.compress(state, stats)
        assert after.mask_OI is not None
        assert int(after.mask_OI.sum()) == step.kept("x", (48, 64))
        masks.append(after.mask_OI.cpu())
    assert float((masks[0] != masks[1]).double().mean()) < 0.01


def test_learned_shares_repeat_themselves_and_agree_with_a_cpus() -> None:
    x_BTI = torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(0))
    weights = {"loud": 30 * weight(12, 32), "quiet": weight(24, 32, seed=2)}
    found = []
    for device in ("cpu", "cuda", "cuda"):
        there = {name: weight_OI.to(device) for name, weight_OI in weights.items()}
        stats = dict.fromkeys(there, statistics(x_BTI[0], device))
        found.append(learned_shares(SumOfLinears(there, x_BTI.to(device)), stats, 0.6))
    assert found[1] == found[2]
    for name, (share,) in found[0].items():
        assert share == pytest.approx(found[1][name][0], abs=0.05)
