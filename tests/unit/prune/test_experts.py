"""Experts are dropped or merged, and the router follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.prune.conftest import logits, plain

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.transform import EXPERTS
from pocketlm.models import open_model
from pocketlm.models.outline import ModelOutline


def tokenizer_into(source: Path, other: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((other / name).read_bytes())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("merge", [False, True])
def test_zero_ratio_is_identity(saved, compress, tmp_path: Path, family: str, merge: bool) -> None:
    source = saved(family)
    compress(source, tmp_path / "out", {"method": "experts", "ratio": 0.0, "merge": merge})
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(plain(source)))


@pytest.mark.parametrize("score", ["output", "weight", "count"])
def test_experts_that_are_never_chosen_go(saved, compress, tmp_path: Path, score: str) -> None:
    model = plain(saved("mixtral"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.abs_()
            rows = layer.mlp.gate.weight
            rows[1] = rows[[0, 2, 3]].mean(0)  # never above both others' second best
            layer.mlp.experts.down_proj[1] = 0
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    tokenizer_into(source, saved("mixtral"))
    compress(source, out, {"method": "experts", "keep": 3, "score": score})
    smaller = plain(out)
    assert smaller.config.num_local_experts == 3
    assert smaller.model.layers[0].mlp.gate.weight.shape == (3, 32)
    if score == "output":  # its output is nothing
        kept = model.model.layers[0].mlp.experts.down_proj[[0, 2, 3]]
        assert torch.equal(smaller.model.layers[0].mlp.experts.down_proj, kept)


def test_twins_are_merged_into_themselves(saved, compress, tmp_path: Path) -> None:
    """Of two equal experts one goes, and the average is what they were."""
    model = plain(saved("qwen3-moe"))
    with torch.no_grad():
        for index in (0, 2, 3):
            experts = model.model.layers[index].mlp.experts
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight[4] = weight[1]
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    tokenizer_into(source, saved("qwen3-moe"))
    compress(source, out, {"method": "experts", "keep": 5, "merge": True}, samples=8)
    assert plain(out).config.num_experts == 5
    ledger = json.loads((out / "pocketlm" / "ledger.json").read_text())
    assert "merged" in {entry["action"] for entry in ledger["tensors"].values()}
    assert torch.isfinite(logits(plain(out))).all()


def test_fewer_than_a_token_takes_is_refused(saved, compress, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 that a token takes"):
        compress(saved("mixtral"), tmp_path / "out", {"method": "experts", "keep": 1})


def test_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no experts"):
        ModelOutline(open_model(build("llama"))).structures(EXPERTS)


def test_configuration_keeps_the_sources_names(saved, compress, tmp_path: Path) -> None:
    """transformers knows the number of experts by two names; the file must not say two numbers."""
    source, out = tmp_path / "source", tmp_path / "out"
    plain(saved("qwen3-moe")).save_pretrained(source)
    tokenizer_into(source, saved("qwen3-moe"))
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    (source / "config.json").write_text(json.dumps(config))
    compress(source, out, {"method": "experts", "keep": 4})
    written = json.loads((out / "config.json").read_text())
    assert written["num_experts"] == 4
    assert "num_local_experts" not in written
