"""The Hessian: the panels make the whole matrix, in any order, merged or not."""

from __future__ import annotations

import pytest
import torch

from pocketlm.core import stats
from pocketlm.core.stats import AbsMean, Hessian


@pytest.mark.parametrize("panel", [5, 16, 64])
def test_panels_make_the_gram_matrix(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(stats, "PANEL", panel)
    x_TI = torch.randn(4, 25, 48, generator=torch.Generator().manual_seed(0))
    first, second = Hessian(48), Hessian(48)
    first.add(x_TI[:2])
    second.add(x_TI[2:])
    first.merge(second)
    flat_TI = x_TI.reshape(-1, 48).double()
    expected_II = 2 / 100 * flat_TI.T @ flat_TI
    assert first.tokens == 100
    assert torch.allclose(first.matrix_II().double(), expected_II, atol=1e-5)
    assert torch.allclose(first.diagonal_I().double(), expected_II.diagonal(), atol=1e-5)


def test_factor_is_renewed_when_tokens_come() -> None:
    stat = Hessian(8)
    stat.add(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    before = stat.inverse_factor(0.01, None)
    assert stat.inverse_factor(0.01, None) is before
    stat.add(torch.randn(50, 8, generator=torch.Generator().manual_seed(2)) * 3)
    assert not torch.equal(stat.inverse_factor(0.01, None).upper_II, before.upper_II)


def gathered(x_TI: torch.Tensor) -> Hessian:
    stat = Hessian(x_TI.shape[-1])
    stat.add(x_TI)
    return stat


@pytest.mark.parametrize("panel", [5, 64])
def test_effective_rank_counts_directions(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(stats, "PANEL", panel)
    generator = torch.Generator().manual_seed(0)
    free_TI = torch.randn(20_000, 32, generator=generator)
    assert gathered(free_TI).effective_rank() == pytest.approx(32, rel=0.05)
    massive_TI = free_TI * torch.logspace(0, 3, 32)
    assert gathered(massive_TI).effective_rank() == pytest.approx(32, rel=0.05)
    assert gathered(free_TI[:, :1].expand(-1, 32)).effective_rank() == pytest.approx(1)
    pairs_TI = free_TI[:, :16].repeat(1, 2)
    assert gathered(pairs_TI).effective_rank() == pytest.approx(16, rel=0.05)
    dead_TI = free_TI.clone()
    dead_TI[:, 8:] = 0
    assert gathered(dead_TI).effective_rank() == pytest.approx(8, rel=0.05)
    assert Hessian(32).effective_rank() == 0


def test_effective_rank_is_that_of_the_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(3)
    stat = gathered(
        torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    )
    hessian_II = stat.matrix_II().double()
    size_I = hessian_II.diagonal().sqrt()
    values_I = torch.linalg.eigvalsh(hessian_II / size_I / size_I[:, None])
    expected = float(values_I.sum() ** 2 / values_I.square().sum())
    assert stat.effective_rank() == pytest.approx(expected, rel=1e-4)


def test_few_tokens_shrink_the_hessian_more() -> None:
    generator = torch.Generator().manual_seed(4)
    for tokens, share in ((16, 2.0), (32, 1.0), (3200, 0.01)):
        stat = gathered(torch.randn(tokens, 32, generator=generator))
        full_II, shrunk_II = stat.matrix_II(), stat.shrunk_II(0.25)
        off_II = ~torch.eye(32, dtype=torch.bool)
        assert torch.equal(shrunk_II[off_II], full_II[off_II])
        assert torch.allclose(shrunk_II.diagonal(), full_II.diagonal() * (1.25 + share))
    assert torch.equal(Hessian(32).shrunk_II(), torch.zeros(32, 32))


def test_through_a_linear_is_the_hessian_of_what_it_gives() -> None:
    draw = torch.Generator().manual_seed(4)
    x_TI, weight_RI = torch.randn(90, 20, generator=draw), torch.randn(6, 20, generator=draw)
    before, after = Hessian(20), Hessian(6)
    before.add(x_TI)
    after.add(x_TI @ weight_RI.T)
    carried = before.through(weight_RI)
    assert carried.tokens == 90
    assert torch.allclose(carried.matrix_II(), after.matrix_II(), rtol=1e-4, atol=1e-3)


def test_mean_magnitude_of_all_tokens_however_they_come() -> None:
    x_TI = torch.randn(70, 12, generator=torch.Generator().manual_seed(5))
    first, second = AbsMean(12), AbsMean(12)
    first.add(x_TI[:50])
    second.add(x_TI[50:])
    first.merge(second)
    assert torch.allclose(first.value_I(), x_TI.abs().mean(0), rtol=1e-5)
