"""Compression on a GPU: kernels do what the loops do, and a run gives the same bytes every time.

The kernels against their references one by one: tests/unit/core/test_column_kernel.py and
tests/unit/quant/test_grid_kernel.py, which take a GPU where there is one:
``pytest -m "gpu or not slow" tests/gpu tests/unit/core tests/unit/quant``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.e2e.conftest import save_model

from pocketlm import api
from pocketlm.core import columns
from pocketlm.core.linalg import inverse_factor, product
from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState, Statistics
from pocketlm.core.stats import Hessian
from pocketlm.core.tensors import Dense, PackedInt
from pocketlm.prune.updates import Sparsegpt, SparsegptJoint
from pocketlm.quant import grid
from pocketlm.quant.awq import Awq
from pocketlm.quant.clip import Clip
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.refine import Refine

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 300, 512


@pytest.fixture
def hessian() -> Hessian:
    generator = torch.Generator().manual_seed(1)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x_TI = torch.randn(4 * COLUMNS, COLUMNS, generator=generator) @ mixing_II
    stat = Hessian(COLUMNS, "cuda")
    for part in x_TI.cuda().bfloat16().split(700):
        stat.add(part)
    return stat


@pytest.fixture
def weight_OI() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).cuda()


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Makes the loops serve where kernels would."""

    def use() -> None:
        monkeypatch.setattr(columns, "serves", lambda tensor: False)
        monkeypatch.setattr(grid, "kernel_serves", lambda weight_OI, spec: False)

    yield use
    monkeypatch.undo()


def test_kernels_run_here() -> None:
    assert columns.kernel_trouble() is None


def test_hessians_are_exact_to_float32(hessian: Hessian) -> None:
    generator = torch.Generator().manual_seed(3)
    x_TI = torch.randn(5000, 4000, generator=generator).cuda().bfloat16()
    stat = Hessian(4000, "cuda")
    for part in x_TI.split(1024):
        stat.add(part)
    exact_II = x_TI.double().T @ x_TI.double() * (2 / 5000)
    torch.testing.assert_close(stat.matrix_II().double(), exact_II, rtol=1e-4, atol=1e-4)


def test_factors_are_inverse(hessian: Hessian) -> None:
    generator = torch.Generator().manual_seed(4)
    x_TI = torch.randn(6000, 2000, generator=generator).cuda()
    hessian_II = x_TI.T @ x_TI / 6000
    factor = inverse_factor(hessian_II, 0.01)
    damped_II = hessian_II.double()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    upper_II = factor.upper_II.double()
    assert torch.equal(factor.upper_II, factor.upper_II.triu())
    eye_II = torch.eye(2000, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(upper_II.T @ upper_II @ damped_II, eye_II, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("terms", "tolerance"), [(1, 4e-3), (3, 2e-5)])
def test_products_of_terms(terms: int, tolerance: float) -> None:
    left, right = torch.randn(300, 700, device="cuda"), torch.randn(700, 500, device="cuda")
    exact = left.double() @ right.double()
    error = (product(left, right, terms=terms).double() - exact).norm() / exact.norm()
    assert float(error) < tolerance


@pytest.mark.parametrize("symmetric", [True, False])
def test_kernels_do_what_loops_do(
    weight_OI: torch.Tensor, hessian: Hessian, symmetric: bool, loops
) -> None:
    spec, found = QuantSpec(bits=4, group_size=128, symmetric=symmetric), []
    for kernels in (True, False):
        if not kernels:
            loops()
        state = LinearState("x", weight_OI, spec, torch.bfloat16)
        for step in (Clip(), Gptq(), Refine()):
            state = step.compress(state, Statistics(hessian))
        assert isinstance(state.current, PackedInt)
        error = relative_error(weight_OI, state.current.dequantize(), hessian.matrix_II())
        found.append((state.current.codes_OI, error))
    # A weight on the edge of two codes may fall either way, and its row after it.
    assert float((found[0][0] != found[1][0]).double().mean()) < 0.02
    assert found[0][1] == pytest.approx(found[1][1], rel=5e-3)


@pytest.mark.parametrize("step", [Sparsegpt, SparsegptJoint])
def test_pruning_kernels_do_what_loops_do(
    weight_OI: torch.Tensor, hessian: Hessian, step: type[Sparsegpt], loops
) -> None:
    found = []
    for kernels in (True, False):
        if not kernels:
            loops()
        spec = QuantSpec(bits=4, group_size=128) if step is SparsegptJoint else None
        state = LinearState("x", weight_OI, spec, torch.bfloat16)
        after = step.parse({"sparsity": "2:4"}).compress(state, Statistics(hessian))
        assert isinstance(after.current, Dense | PackedInt)
        assert after.mask_OI is not None
        assert bool((after.mask_OI.view(ROWS, -1, 4).sum(-1) == 2).all())
        found.append((after.mask_OI, after.current.dequantize()))
    assert float((found[0][0] != found[1][0]).double().mean()) < 0.02
    errors = [relative_error(weight_OI, value, hessian.matrix_II()) for _, value in found]
    assert errors[0] == pytest.approx(errors[1], rel=2e-2)


def test_awq_finds_what_it_finds_without_kernels(
    weight_OI: torch.Tensor, hessian: Hessian, loops
) -> None:
    state = LinearState("x", weight_OI, QuantSpec(bits=3, group_size=128), torch.bfloat16)
    ours_I = Awq(steps=8).scale([state], Statistics(hessian))
    loops()
    other_I = Awq(steps=8).scale([state], Statistics(hessian))
    assert ours_I is not None
    assert other_I is not None
    errors = []
    for scale_I in (ours_I, other_I):
        rounded = grid.searched_grid(weight_OI * scale_I, state.spec, torch.bfloat16, steps=5)
        decoded = grid.round_to_grid(weight_OI * scale_I, rounded, state.spec).dequantize()
        errors.append(relative_error(weight_OI, decoded / scale_I, hessian.matrix_II()))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        {"steps": ["clip", "gptq", "refine"]},
        {"steps": ["awq", "clip", "rtn"]},
        {"steps": [{"method": "sparsegpt", "sparsity": "2:4"}], "weights": None},
    ],
    ids=["gptq", "awq", "sparsegpt"],
)
def test_a_run_repeats_itself(tmp_path: Path, recipe: dict[str, object]) -> None:
    source, digests = save_model(tmp_path / "model"), []
    for name in ("one", "other"):
        made = api.compress(source, recipe, tmp_path / name, samples=32, seq_len=64, device="cuda")
        digests.append(hashlib.sha256((made.output / "model.safetensors").read_bytes()).digest())
        ledger = (made.output / "pocketlm" / "ledger.json").read_text()
        assert "Triton" not in ledger
    assert digests[0] == digests[1]
