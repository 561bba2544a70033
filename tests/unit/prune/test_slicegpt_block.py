"""A basis for each block: the same function until it is cut, and what runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.prune.conftest import logits, plain
from transformers import AutoModelForCausalLM

import pocketlm
import pocketlm.hf  # noqa: F401  (teaches transformers the format)
from pocketlm.core.errors import PocketLMError, UnsupportedLayer, UnsupportedModel
from pocketlm.models import open_model
from pocketlm.models.outline import ModelOutline

APART = {"method": "slicegpt", "rotation": "block"}


def basis(kept: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:, :kept]


def shortcuts(path: Path) -> list[str]:
    section = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    return section["shortcuts"]


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "qwen3"])
def test_zero_ratio_is_the_same_function(saved, compress, tmp_path: Path, family: str) -> None:
    """Turned whole, in float32, by both roads that run it, bit for bit alike."""
    source = saved(family)
    compress(source, tmp_path / "out", {**APART, "ratio": 0.0})
    ours = logits(pocketlm.load(tmp_path / "out", dtype=torch.float32)[0])
    torch.testing.assert_close(ours, logits(plain(source)), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, logits(plain(tmp_path / "out")))
    assert shortcuts(tmp_path / "out") == [f"model.layers.{i}.shortcut" for i in (1, 2, 3)]
    turned = plain(tmp_path / "out").model.layers[2].shortcut.weight
    assert (turned - torch.eye(32)).abs().max() > 0.1
