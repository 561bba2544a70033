"""The inverse factor is exact, and the ladder is climbed and named."""

from __future__ import annotations

import pytest
import torch

from pocketlm.core import linalg
from pocketlm.core.errors import NumericError
from pocketlm.core.linalg import inverse_factor


def gram(rank: int, columns: int = 40) -> torch.Tensor:
    x_TI = torch.randn(rank, columns, generator=torch.Generator().manual_seed(rank))
    return x_TI.T @ x_TI


def test_factor_of_the_inverse() -> None:
    hessian_II = gram(200)
    factor = inverse_factor(hessian_II, 0.01)
    damped_II = hessian_II.double()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    upper_II = factor.upper_II.double()
    assert factor.rung == ""
    assert torch.equal(factor.upper_II, factor.upper_II.triu())
    assert torch.allclose(upper_II.T @ upper_II @ damped_II, torch.eye(40).double(), atol=1e-4)


def test_rank_deficient_holds_by_damping() -> None:
    assert inverse_factor(gram(5), 0.01).rung == ""


def test_indefinite_climbs_and_says_so() -> None:
    hessian_II = gram(200)
    hessian_II.diagonal().sub_(
        0.05 * hessian_II.diagonal().mean() + torch.linalg.eigvalsh(hessian_II)[0]
    )
    factor = inverse_factor(hessian_II, 0.01)
    assert factor.rung == "damping x10"
    assert factor.damping == pytest.approx(0.1)


def test_strongly_indefinite_ends_in_clipped_eigenvalues() -> None:
    values_I = torch.ones(40)
    values_I[0] = -30.0
    basis_II = torch.linalg.qr(gram(200))[0]
    factor = inverse_factor((basis_II * values_I) @ basis_II.T, 0.001)
    assert factor.rung == "eigenvalues clipped"
    assert torch.isfinite(factor.upper_II).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_an_error(value: float) -> None:
    hessian_II = gram(200)
    hessian_II[3, 3] = value
    with pytest.raises(NumericError, match="NaN or Inf"):
        inverse_factor(hessian_II, 0.01)


def test_zeros_are_an_error() -> None:
    with pytest.raises(NumericError, match="every rung"):
        inverse_factor(torch.zeros(8, 8), 0.01)


@pytest.mark.parametrize("columns", [1, 3, 64, 130])
def test_triangles_are_inverted_by_halves(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "SOLVED_SIDE", 8)
    generator = torch.Generator().manual_seed(columns)
    upper_II = torch.randn(columns, columns, generator=generator, dtype=torch.float64).triu()
    upper_II.diagonal().add_(columns)
    inverse_II = upper_II.clone()
    linalg.invert_upper(inverse_II)
    expected_II = torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(inverse_II @ upper_II, expected_II, rtol=0, atol=1e-10)
    assert torch.equal(inverse_II, inverse_II.triu())
