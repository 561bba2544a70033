"""Tiny random models, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random model of a family and gives its directory."""

    def save(
        family: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: object
    ) -> Path:
        build(family, dtype, **changes).save_pretrained(tmp_path, max_shard_size=shard)
        return tmp_path

    return save
