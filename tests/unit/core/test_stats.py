"""The Hessian: the panels make the whole matrix, in any order, merged or not."""

from __future__ import annotations

import pytest
import torch

from pocketlm.core import stats
from pocketlm.core.stats import Hessian


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
