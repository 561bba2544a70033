"""Shapes in annotations are checked in tests: a wrong one is an error at the call."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from pocketlm.core.linalg import inverse_factor


@pytest.mark.usefixtures("checked_shapes")
def test_a_wrong_shape_is_an_error() -> None:
    inverse_factor(torch.eye(3), 0.01)
    with pytest.raises(TypeCheckError, match="hessian_II"):
        inverse_factor(torch.ones(3, 4), 0.01)
