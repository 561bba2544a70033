"""Every number format on a GPU as on the CPU; run with ``pytest -m gpu tests/gpu``."""

import pytest
import torch
from tests.unit.runtime.helpers import rounded

from pocketlm.core.measure import relative_error
from pocketlm.core.spec import SCHEMES
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.quant.clip import Clip
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.grid import minmax_grid, round_to_grid, searched_grid
from pocketlm.quant.refine import Refine
from pocketlm.runtime.linear import PackedLinear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
FLOATS = [name for name, spec in SCHEMES.items() if spec.type not in ("int", "k")]
K_QUANTS = [name for name, spec in SCHEMES.items() if spec.type == "k"]


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_that_of_the_cpu(name):
    spec = SCHEMES[name].fit(320)
    weight_OI = torch.randn(200, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    for make in (minmax_grid, searched_grid):
        packed = []
        for device in ("cpu", CUDA):
            grid = make(weight_OI.to(device), spec, torch.bfloat16)
            packed.append(round_to_grid(weight_OI.to(device), grid, spec).to("cpu"))
        if make is minmax_grid and spec.scale != "dynamic8":  # whose mean depends on the order
            assert torch.equal(packed[0].codes_OI, packed[1].codes_OI)
        difference = (packed[0].dequantize() - packed[1].dequantize()).norm()
        assert difference < 0.01 * weight_OI.norm()


@pytest.mark.parametrize("name", [*FLOATS, *K_QUANTS])
def test_methods_run_there(name):
    columns = 512 if name in K_QUANTS else 320
    spec = SCHEMES[name].fit(columns)
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(200, columns, generator=generator) * 0.02
    x_TI = torch.randn(900, columns, generator=generator)
    x_TI = x_TI @ torch.randn(columns, columns, generator=generator)
    errors = []
    for device in (torch.device("cpu"), CUDA):
        stat = Hessian(columns, device)
        stat.add(x_TI.to(device))
        state = LinearState("x", weight_OI.to(device), spec, torch.bfloat16)
        for step in (Clip(), Gptq(), Refine()):
            state = step.compress(state, Statistics(stat))
        decoded_OI = state.current.dequantize()
        errors.append(relative_error(weight_OI.to(device), decoded_OI, stat.matrix_II()))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linears_run_there(name, dtype):
    weight = rounded(torch.randn(300, 256), SCHEMES[name].fit(256))
    linear = PackedLinear(weight, dtype=dtype, device=CUDA)
    x_MI = torch.randn(5, 256).to(dtype)
    truth_MO = x_MI.double() @ weight.dequantize(torch.float64).T
    found_MO = linear(x_MI.to(CUDA)).cpu().double()
    assert (found_MO - truth_MO).norm() < (1e-2 if dtype is torch.bfloat16 else 2e-3) * (
        truth_MO.norm()
    )
