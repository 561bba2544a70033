"""The stream is turned into another basis: the same function, until it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.prune.conftest import logits, plain

from pocketlm.core.errors import ConfigError, PocketLMError, UnsupportedLayer
from pocketlm.models import open_model
from pocketlm.models.outline import ModelOutline


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "qwen3", "granite"])
def test_zero_ratio_is_the_same_function(saved, compress, tmp_path: Path, family: str) -> None:
    """Rotated whole, in float32, loaded by plain transformers."""
    source = saved(family)
    compress(source, tmp_path / "out", {"method": "slicegpt", "ratio": 0.0})
    turned = plain(tmp_path / "out")
    torch.testing.assert_close(logits(turned), logits(plain(source)), rtol=1e-4, atol=1e-4)
    inner = turned.model.layers[1].mlp.up_proj.weight
    assert (inner - plain(source).model.layers[1].mlp.up_proj.weight).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_16_bits_are_proved_without_their_rounding(dtype: torch.dtype) -> None:
    """Rounded to bfloat16, a turned embedding is off by 2e-3: no fault of the rotation."""
    outline = ModelOutline(open_model(build("llama", dtype)))
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    matrices = [torch.linalg.qr(square)[0][:, :24]] * 4
    outline.rotate(matrices[:1])
    outline.rotate(matrices)


def test_stream_of_low_rank_is_cut_without_loss(saved, compress, tmp_path: Path) -> None:
    """All writers write into 24 of 32 dimensions, in a turned basis: the other 8 go for nothing."""
    model = plain(saved("llama"))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 24, generator=generator))[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(basis @ basis.T @ linear.weight)
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved("llama") / name).read_bytes())
    compress(source, tmp_path / "out", {"method": "slicegpt", "ratio": 0.25})
    smaller = plain(tmp_path / "out")
    assert (smaller.config.hidden_size, smaller.config.head_dim) == (24, 8)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=2e-3, atol=2e-3)


def test_tied_head_is_untied_and_said(saved, compress, tmp_path: Path) -> None:
    result = compress(saved("qwen3"), tmp_path / "out", {"method": "slicegpt", "ratio": 0.25})
    assert any("no longer tied" in warning for warning in result.warnings)
    smaller = plain(tmp_path / "out")
    assert smaller.config.tie_word_embeddings is False
    assert smaller.lm_head.weight.data_ptr() != smaller.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", ["gpt2", "olmo2", "gemma2", "mixtral", "opt"])
def test_refused_where_norms_do_not_allow_it(family: str) -> None:
    outline = ModelOutline(open_model(build(family)))
    with pytest.raises(PocketLMError) as caught:
        outline.rotate([torch.eye(32, dtype=torch.float64)])
    assert caught.value.where


def test_wrong_rotation_is_not_proved(monkeypatch) -> None:
    """Norm weights left out of the readers: the proof must see it."""
    outline = ModelOutline(open_model(build("llama")))
    monkeypatch.setattr(
        "pocketlm.models.rotation.Rotation._weight",
        lambda self, norm: torch.ones(32, dtype=torch.float64),
    )
    with pytest.raises(UnsupportedLayer, match=r"layers\.0"):
        outline.rotate([torch.eye(32, dtype=torch.float64)])


@pytest.mark.parametrize("options", [{"hidden": 33}, {"ratio": 0.5, "multiple_of": 64}])
def test_refused_sizes(saved, compress, tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        compress(saved("llama"), tmp_path / "out", {"method": "slicegpt", **options})
