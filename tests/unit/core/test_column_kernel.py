"""The kernel of a block of columns against the elimination and the loop, in Triton's interpreter.

Needs Triton, which PyTorch's CUDA builds bring (`tests/gpu` runs the same on a GPU).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from pocketlm.core import columns
from pocketlm.core.column_kernel import walk
from pocketlm.core.columns import Rounding, descend, feed_back
from pocketlm.core.levels import rounder
from pocketlm.core.spec import GGUF_TYPES, QuantSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTEGERS = [QuantSpec(bits=4, group_size=8), QuantSpec(bits=3, group_size=8, symmetric=False)]
TABLES = [
    QuantSpec(bits=4, group_size=8, type="nf"),
    QuantSpec(bits=3, group_size=8, type="nf"),
    QuantSpec(bits=4, group_size=8, type="bnb_fp"),
]
BLOCKS = [GGUF_TYPES[name] for name in ("Q4_K", "Q2_K", "Q6_K", "Q5_1", "IQ4_NL")]
FLOATS = [
    QuantSpec(bits=4, type="float", scale="e8m0", group_size=32),
    QuantSpec(bits=8, group_size=8, type="float"),
]


class Case:
    """A block [C, O] with a factor of some Hessian, a grid and a mask."""

    def __init__(self, spec: QuantSpec, rows: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows + width)
        x_TC = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
        x_TC = x_TC @ torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.hessian_CC = x_TC.T @ x_TC / len(x_TC)
        self.hessian_CC.diagonal().mul_(1.01)
        inverse_CC = torch.linalg.inv(self.hessian_CC)
        self.upper_CC = torch.linalg.cholesky(inverse_CC, upper=True)
        weight_CO = torch.randn(width, rows, generator=generator, dtype=torch.float64)
        scale_O = weight_CO.abs().amax(0) / 7 * (1 - 2 * (torch.arange(rows) % 2))
        if spec.type != "int":
            scale_O = scale_O.abs()
        zero_O = torch.randint(spec.code_min, spec.code_max, (rows,), generator=generator)
        if spec.type == "k":  # a minimum over the scale: no integer
            zero_O = torch.rand(rows, generator=generator) * (1 << spec.bits)
        mask_CO = torch.rand(width, rows, generator=generator) < 0.6
        self.spec, self.mask_CO = spec, mask_CO.to(DEVICE)
        self.weight_CO, self.hessian_CC, self.upper_CC, scale_CO = (
            t.to(DEVICE, dtype)
            for t in (weight_CO, self.hessian_CC, self.upper_CC, scale_O.expand(width, -1))
        )
        zero_CO = None if spec.symmetric else zero_O.expand(width, -1).to(DEVICE, dtype).clone()
        self.rounding = Rounding(spec, scale_CO.contiguous(), zero_CO)

    def settled(self, column_O: Tensor, i: int, masked: bool) -> Tensor:
        """Levels of a column by the definition of the format."""
        zero_CO = self.rounding.zero_IO
        level_O = rounder(self.spec)(
            column_O, self.rounding.scale_IO[i], None if zero_CO is None else zero_CO[i]
        )
        return level_O * self.mask_CO[i] if masked else level_O


def eliminated(case: Case, masked: bool) -> Tensor:
    """Column by column, each updating the inverse Hessian itself: no factor."""
    rest_CO, inverse_CC = case.weight_CO.clone(), torch.linalg.inv(case.hessian_CC)
    level_CO = torch.empty_like(rest_CO)
    for i in range(len(rest_CO)):
        level_CO[i] = case.settled(rest_CO[i], i, masked)
        error_O = (rest_CO[i] - level_CO[i] * case.rounding.scale_IO[i]) / inverse_CC[i, i]
        rest_CO -= torch.outer(inverse_CC[i], error_O)
        inverse_CC = inverse_CC - torch.outer(inverse_CC[i], inverse_CC[i]) / inverse_CC[i, i]
    return level_CO


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", [*INTEGERS, *TABLES, *BLOCKS], ids=lambda s: s.name)
def test_the_kernel_is_the_elimination(spec: QuantSpec, masked: bool) -> None:
    case = Case(spec, 20, 20, torch.float64)
    mask_CO = case.mask_CO if masked else None
    level_CO, _ = walk(
        case.weight_CO, case.upper_CC, spec, case.rounding.scale_IO, case.rounding.zero_IO,
        mask_CO, None, program_rows=16,
    )  # fmt: skip
    torch.testing.assert_close(level_CO, eliminated(case, masked), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", [None, *INTEGERS, *TABLES, *FLOATS, *BLOCKS], ids=str)
def test_the_kernel_is_the_loop(spec: QuantSpec | None) -> None:
    case = Case(spec or INTEGERS[0], 20, 20, torch.float32)
    rounding = None if spec is None else case.rounding
    scale_CO = None if rounding is None else rounding.scale_IO
    zero_CO = None if rounding is None else rounding.zero_IO
    found = walk(
        case.weight_CO, case.upper_CC, spec, scale_CO, zero_CO, case.mask_CO, None, program_rows=16
    )
    expected = loop(feed_back, case.weight_CO.clone(), case.upper_CC, rounding, case.mask_CO)
    for ours_CO, loops_CO in zip(found, expected, strict=True):
        off_CO = (ours_CO - loops_CO).abs() > 1e-3 * (1 + loops_CO.abs())
        # float32: a weight on the edge of two levels may fall either way, and its row after it
        assert float(off_CO.any(0).double().mean()) < 0.1


@pytest.mark.parametrize("spec", [*INTEGERS, TABLES[0], FLOATS[0], BLOCKS[0]], ids=str)
def test_descent_by_the_kernel_is_the_loops(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kernel in (False, True):
        case = Case(spec, 20, 20, torch.float32)
        error_CO = case.weight_CO * 0.1
        monkeypatch.setattr(columns, "serves", lambda tensor, kernel=kernel: kernel)
        slope_CO = case.hessian_CC @ error_CO
        level_CO = descend(
            case.weight_CO, error_CO, slope_CO, case.hessian_CC, case.rounding, case.mask_CO.clone()
        )
        results.append((level_CO, error_CO))
    for loops_CO, ours_CO in zip(*results, strict=True):
        off_CO = (ours_CO - loops_CO).abs() > 1e-3 * (1 + loops_CO.abs())
        assert float(off_CO.any(0).double().mean()) < 0.1


def loop(function, *arguments):
    """A function of `columns` without the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "serves", lambda tensor: False)
        return function(*arguments)
