"""Channels in another order: the same model, of which N:M keeps more."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from tests.unit.prune.conftest import logits, plain

import pocketlm
from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.stored import SparsitySpec
from pocketlm.engine.compress import finished_ledger
from pocketlm.prune.permute import Permute, best_order, kept_share
from pocketlm.recipes import build_recipe

HALF = SparsitySpec(keep=2, of=4)


def test_the_order_is_near_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        score_OI = torch.rand(6, 8, generator=generator) ** 3
        every = []
        for others in combinations(
            range(1, 8), 3
        ):  # beside column 0: order in a group is no matter
            group = [0, *others]
            order = [*group, *(i for i in range(8) if i not in group)]
            every.append(kept_share(score_OI[:, order], HALF))
        found = kept_share(score_OI[:, best_order(score_OI, HALF)], HALF)
        assert found >= kept_share(score_OI, HALF)
        assert found > max(every) - 0.25 * (max(every) - min(every))


def test_columns_that_matter_are_spread_over_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the groups are assigned in parts."""
    monkeypatch.setattr("pocketlm.prune.permute.AT_ONCE", 3)
    score_OI = torch.full((5, 32), 0.01)
    score_OI[:, :16] = 1.0  # all of the first four groups, none of the others
    order_I = best_order(score_OI, HALF)
    assert sorted(order_I.tolist()) == list(range(32))
    assert (
        abs(kept_share(score_OI[:, order_I], HALF) - score_OI[:, :16].sum() / score_OI.sum()) < 1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_the_model_stays_the_same(saved, compress, tmp_path: Path, family: str) -> None:
    source = saved(family)
    compress(source, tmp_path / "out", "permute")
    before, after = plain(source), plain(tmp_path / "out")
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=1e-5)
    inner = {"gpt2": "h.1.mlp.c_proj", "mixtral": "layers.1.mlp.experts.down_proj"}
    ending = inner.get(family, "layers.1.mlp.down_proj")
    pair = [next(p for n, p in m.named_parameters() if ending in n) for m in (before, after)]
    assert not torch.equal(*pair)
    ledger = finished_ledger(tmp_path / "out")
    assert ledger is not None
    assert "of the readers' score kept" in ledger.stages[0].summary


def test_pruning_after_it_keeps_more(saved, text_file: Path, tmp_path: Path) -> None:
    kept = []
    for name, steps in (("plain", ["wanda"]), ("moved", ["permute", "wanda"])):
        recipe = build_recipe(
            {"steps": steps, "weights": None, "ignore": ["lm_head"]}, sparsity="2:4"
        )
        settings = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
        pocketlm.compress(saved("llama"), recipe, tmp_path / name, **settings)
        weights = [layer.mlp.down_proj.weight for layer in plain(tmp_path / name).model.layers]
        kept.append(sum(float(weight.detach().abs().sum()) for weight in weights))
        assert all(float((weight == 0).double().mean()) == 0.5 for weight in weights)
    assert kept[1] > kept[0]


def test_channels_of_large_inputs_are_spread(saved, text_file: Path, tmp_path: Path) -> None:
    """Weights alike, inputs not: half of the channels carry all, and lie side by side."""
    model, source = plain(saved("llama")), tmp_path / "source"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:24] *= 30
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved("llama") / name).read_bytes())
    others = ["lm_head", *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up"))]
    settings = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    lost = []
    for name, steps in (("plain", ["wanda"]), ("moved", ["permute", "wanda"])):
        asked = {"steps": steps, "weights": None, "ignore": others}
        pocketlm.compress(source, build_recipe(asked, sparsity="2:4"), tmp_path / name, **settings)
        lost.append(float((logits(plain(tmp_path / name)) - logits(model)).norm()))
    assert lost[1] < 0.2 * lost[0]


def test_what_has_no_groups_is_refused(saved, compress, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no groups: give N:M"):
        Permute.parse({"sparsity": 0.5})
    with pytest.raises(UnsupportedLayer, match=r"groups of 10 \(3:10\) do not divide 48 columns"):
        compress(saved("llama"), tmp_path / "out", {"method": "permute", "sparsity": "3:10"})
