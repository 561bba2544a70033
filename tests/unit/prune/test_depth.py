"""Blocks are removed, renumbered, and everything else stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.unit.prune.conftest import BLOCKS, logits, plain

import pocketlm
from pocketlm.core.errors import ConfigError
from pocketlm.engine.journal import Journal
from pocketlm.engine.ledger import Ledger
from pocketlm.models import open_model
from pocketlm.models.outline import ModelOutline
from pocketlm.report.data import read_metrics


def ledger_of(path: Path) -> Ledger:
    return Ledger.model_validate_json((path / "pocketlm" / "ledger.json").read_text())


def without(model, index: int):
    """The model in memory without one block, by transformers' own means."""
    del model.model.layers[index]
    model.config.num_hidden_layers = len(model.model.layers)
    return model


@pytest.mark.parametrize("score", ["influence", "taylor", "random"])
def test_removes_the_block_that_does_least(saved, compress, tmp_path: Path, score: str) -> None:
    """A block whose outputs are zero is found by every score but chance."""
    source = tmp_path / "source"
    model = plain(saved("llama"))
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved("llama") / name).read_bytes())
    out = tmp_path / "out"
    compress(source, out, {"method": "depth", "blocks": 1, "score": score})
    smaller = plain(out)
    assert smaller.config.num_hidden_layers == BLOCKS - 1
    if score != "random":
        assert torch.allclose(logits(smaller), logits(model), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3-moe", "gpt2", "opt"])
def test_loads_in_transformers(saved, compress, tmp_path: Path, family: str) -> None:
    """Lists by block are cut, lists of blocks renumbered, and tied weights stay tied."""
    sizes = {"n_layer": BLOCKS} if family == "gpt2" else {}
    source, out = saved(family, **sizes), tmp_path / "out"
    compress(source, out, {"method": "depth", "ratio": 0.5})
    smaller, original = plain(out), plain(source)
    config = json.loads((out / "config.json").read_text())
    text = smaller.config.to_dict()
    assert (text.get("num_hidden_layers") or text["n_layer"]) == 2
    assert all(len(config.get(key) or [0, 0]) == 2 for key in ("layer_types",))
    told = ledger_of(out).stages[0].summary.split(":")[1].replace("–", ", ")
    removed = [i for i in range(BLOCKS) if str(i) in told]
    entries = ledger_of(out).tensors
    for name, entry in entries.items():
        gone = any(f".{i}." in f".{name}" for i in removed) and "experts" not in name
        if gone and ".layers." in f".{name}":
            assert entry.action == "dropped"
    total = sum(p.numel() for p in original.parameters())
    assert sum(p.numel() for p in smaller.parameters()) < total


def test_result_is_the_model_without_those_blocks(saved, compress, tmp_path: Path) -> None:
    source, out = saved("llama"), tmp_path / "out"
    compress(source, out, {"method": "shortgpt", "blocks": 1})
    removed = int(ledger_of(out).stages[0].summary.split(": ")[1])
    assert torch.allclose(logits(plain(out)), logits(without(plain(source), removed)), atol=1e-6)


def test_then_quantized(saved, compress, tmp_path: Path) -> None:
    """Two stages: one artifact, whose ledger and recipe name both; a second run changes nothing."""
    source, out = saved("llama"), tmp_path / "out"
    steps = ({"method": "depth", "ratio": 0.25}, {"method": "rtn"})
    first = compress(source, out, *steps)
    assert not first.already_done
    assert [stage.method for stage in ledger_of(out).stages] == ["depth"]
    assert "depth" in (out / "pocketlm" / "recipe.yaml").read_text()
    assert first.plan.linears == 7 * 3
    assert compress(source, out, *steps).already_done
    assert not (tmp_path / "out.pocketlm-work").exists()


@pytest.mark.usefixtures("damage_by_stage")
def test_two_transforms(saved, compress, tmp_path: Path) -> None:
    source, out = saved("llama"), tmp_path / "out"
    result = compress(
        source, out, {"method": "depth", "blocks": 1}, {"method": "depth", "blocks": 1}
    )
    assert plain(out).config.num_hidden_layers == BLOCKS - 2
    assert len(ledger_of(out).stages) == 2
    assert len(result.plan.smaller) == 2
    stages = read_metrics(out).stages
    assert [stage.name for stage in stages] == ["original", "depth", "depth"]
    assert stages[0].kl == 0 < stages[1].kl
    assert "Damage by stage" in (out / "pocketlm" / "report.html").read_text()


def test_plan_knows_the_size(saved, compress, tmp_path: Path, text_file: Path) -> None:
    recipe = {"steps": [{"method": "depth", "ratio": 0.5}, "rtn"], "ignore": ["lm_head"]}
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    planned = pocketlm.plan(saved("llama"), recipe, **options)
    result = pocketlm.compress(saved("llama"), recipe, tmp_path / "out", **options)
    assert planned.output_bytes == result.plan.output_bytes
    assert planned.smaller == result.plan.smaller == ["2 of 4 blocks removed"]


@pytest.mark.slow  # tests/contracts does it with one block less
def test_killed_and_resumed(saved, compress, tmp_path: Path, monkeypatch) -> None:
    """A run stopped after two blocks goes on with them, and gives the same bytes."""
    source = saved("llama")
    step = {"method": "depth", "blocks": 2}
    compress(source, tmp_path / "whole", step)
    write, written = Journal.write_block, []

    def stopping(self, index, *rest):
        written.append(index)
        write(self, index, *rest)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", step)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        Journal, "write_block", lambda s, i, *r: (written.append(i), write(s, i, *r))[1]
    )
    compress(source, tmp_path / "out", step)
    assert written == [0, 1, 2, 3]
    for name in ("model.safetensors", "config.json", "pocketlm/ledger.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"ratio": 1.0}, "ratio"), ({"blocks": BLOCKS}, "at least one"), ({"ratio": 0.9}, "at least"),
     ({"blocks": 2, "keep_first": 2, "keep_last": 1}, "at least")],
)  # fmt: skip
def test_refused(saved, compress, tmp_path: Path, options: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        compress(saved("llama"), tmp_path / "out", {"method": "depth", **options})
    assert not (tmp_path / "out").exists()


def test_transform_after_quantization_is_refused(saved, compress, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="first"):
        compress(saved("llama"), tmp_path / "out", "rtn", {"method": "depth"})


def test_no_block_is_refused(saved) -> None:
    with pytest.raises(ConfigError, match="0 of 4"):
        ModelOutline(open_model(saved("llama"))).keep_blocks([])


def test_merged_blocks_are_summed(saved, compress, tmp_path: Path) -> None:
    """LaCo's formula on the whole model, in the weights that are written."""
    source, out = saved("llama"), tmp_path / "out"
    compress(source, out, {"method": "laco", "blocks": 1, "threshold": 0.01})
    before, after = plain(source).model.layers, plain(out).model.layers
    assert len(after) == BLOCKS - 1
    into = next(i for i in range(BLOCKS) if i >= len(after) or not torch.equal(
        before[i].mlp.up_proj.weight, after[i].mlp.up_proj.weight))  # fmt: skip
    summed = before[into + 1].mlp.up_proj.weight  # θ + (θ' - θ)
    torch.testing.assert_close(after[into].mlp.up_proj.weight, summed)


def test_merging_two_into_one() -> None:
    """θ* = θ₀ + (θ₁ - θ₀) + (θ₂ - θ₀)."""
    from tests.unit.models.families import build

    from pocketlm.models.opening import reopen

    model = open_model(build("llama"))
    changes = ModelOutline(model).keep_blocks([0], {0: {1: 1.0, 2: 1.0}})
    name = "model.layers.{}.mlp.up_proj.weight"
    merged = reopen(model, changes).source.read(name.format(0))
    first, second, third = (model.source.read(name.format(i)) for i in range(3))
    torch.testing.assert_close(merged, second + third - first)


def test_laco_removes_the_asked_number(saved, compress, tmp_path: Path) -> None:
    source, out = saved("llama", num_hidden_layers=6), tmp_path / "out"
    compress(source, out, {"method": "laco", "ratio": 0.5})
    assert plain(out).config.num_hidden_layers == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", [{"method": "depth", "blocks": 1}, {"method": "flap", "channels": 32}]),
        ("llama", [{"method": "slicegpt", "ratio": 0.25}, {"method": "rtn"}]),
        ("mixtral", [{"method": "experts", "keep": 3, "merge": True}]),
    ],
)
def test_verified(saved, compress, tmp_path: Path, family: str, steps: list) -> None:
    """Plain transformers in another process gives our logits; every tensor is explained."""
    compress(saved(family), tmp_path / "out", *steps)
    assert pocketlm.verify(tmp_path / "out", saved(family)).failures() == ()


def test_laco_that_finds_no_more_neighbours_stops(saved, compress, tmp_path: Path) -> None:
    step = {"method": "laco", "blocks": 3, "merge": 1, "fall": 0.7}
    with pytest.raises(ConfigError, match="no neighbour"):
        compress(saved("llama"), tmp_path / "out", step)
