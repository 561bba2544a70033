"""Factors on a GPU as on the CPU; run with ``pytest -m gpu tests/gpu``."""

import pytest
import torch

from pocketlm.core.linalg import truncated_svd
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import AbsMean, Hessian
from pocketlm.engine.factors import run_steps
from pocketlm.lowrank.asvd import Asvd
from pocketlm.lowrank.caldera import Caldera
from pocketlm.lowrank.losparse import Losparse
from pocketlm.lowrank.lqer import Lqer
from pocketlm.lowrank.svd import Svd
from pocketlm.lowrank.svd_llm import SvdLlm
from pocketlm.quant.clip import Clip
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.rtn import Rtn

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
RECIPES = {
    "svd": (Svd(ratio=0.2),),
    "asvd": (Asvd(ratio=0.2),),
    "svd_llm": (SvdLlm(ratio=0.2),),
    "svd_llm-gptq": (SvdLlm(ratio=0.2), Clip(), Gptq()),
    "losparse": (Losparse(ratio=0.3),),
    "lqer": (Rtn(), Lqer(rank=16)),
    "caldera": (Gptq(), Caldera(rank=16), Gptq(), Caldera(rank=16)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_methods_run_there(name):
    spec = QuantSpec(bits=4, group_size=64)
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(256, 320, generator=generator) * 0.02
    x_TI = torch.randn(900, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    errors = []
    for device in (torch.device("cpu"), CUDA):
        hessian, mean = Hessian(320, device), AbsMean(320, device)
        hessian.add(x_TI.to(device))
        mean.add(x_TI.to(device))
        state = LinearState("x", weight_OI.to(device), spec, torch.bfloat16)
        state = run_steps(RECIPES[name], state, Statistics(hessian, mean))
        decoded_OI = state.current.dequantize()
        errors.append(relative_error(weight_OI.to(device), decoded_OI, hessian.matrix_II()))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_large_matrix_is_decomposed_at_random_and_well():
    generator = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(4096, 512, generator=generator).to(CUDA)).Q
    right = torch.linalg.qr(torch.randn(4096, 512, generator=generator).to(CUDA)).Q.T
    values = 0.98 ** torch.arange(512.0, device=CUDA)
    found = truncated_svd(left * values @ right, 64)[1]
    assert torch.allclose(found, values[:64], rtol=1e-2)
