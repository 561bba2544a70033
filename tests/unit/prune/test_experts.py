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
    """Of a, 0, -a, b, -b the two largest products with any token are those above zero."""
    original = saved("mixtral", num_local_experts=5)
    model = plain(original)
    with torch.no_grad():
        for layer in model.model.layers:
            rows_ED = layer.mlp.gate.weight
            rows_ED[1], rows_ED[2], rows_ED[4] = 0, -rows_ED[0], -rows_ED[3]
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    tokenizer_into(source, original)
    compress(source, out, {"method": "experts", "keep": 4, "score": score})
    smaller = plain(out)
    assert smaller.config.num_local_experts == 4
    assert smaller.model.layers[0].mlp.gate.weight.shape == (4, 32)
    for before, after in zip(model.model.layers, smaller.model.layers, strict=True):
        kept = before.mlp.experts.down_proj[[0, 2, 3, 4]]
        assert torch.equal(after.mlp.experts.down_proj, kept)


def test_a_twin_is_merged_into_its_twin(saved, compress, tmp_path: Path) -> None:
    """Expert 4 is asked least and has 1's weights: it goes, and their average is what both were."""
    model = plain(saved("qwen3-moe"))
    with torch.no_grad():
        for index in (0, 2, 3):  # block 1 is dense
            layer = model.model.layers[index]
            rows_ED = layer.mlp.gate.weight
            # Of a, -a, b, -b two are above zero, and a part of another direction rarely above them.
            rows_ED[2], rows_ED[5], rows_ED[4] = -rows_ED[0], -rows_ED[3], 0.3 * rows_ED[4]
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight[4] = weight[1]
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    tokenizer_into(source, saved("qwen3-moe"))
    step = {"method": "experts", "keep": 5, "merge": True, "score": "count"}
    compress(source, out, step, samples=8)
    ledger = json.loads((out / "pocketlm" / "ledger.json").read_text())
    assert "merged" in {entry["action"] for entry in ledger["tensors"].values()}
    after = plain(out)
    assert after.config.num_experts == 5
    for index in (0, 2, 3):
        old, new = (one.model.layers[index].mlp for one in (model, after))
        assert torch.equal(new.gate.weight, old.gate.weight[[0, 1, 2, 3, 5]])
        for name in ("gate_up_proj", "down_proj"):
            stay = getattr(old.experts, name)[[0, 1, 2, 3, 5]]
            torch.testing.assert_close(getattr(new.experts, name), stay)


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
