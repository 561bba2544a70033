"""Restoring linears on the way gives what a model written with those weights gives."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.spec import ActivationSpec, Recipe
from pocketlm.evaluate.quality import evaluate_model
from pocketlm.models import open_model
from pocketlm.search.bisect_source import folded_blocks
from pocketlm.search.restore import Restorer

DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.2.self_attn.q_proj"


def rewritten(source: Path, to: Path, change) -> Path:
    """A copy of a model with other tensors."""
    to.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), to / "model.safetensors", metadata={"format": "pt"})
    return to


def noisy(tensors):
    """Every linear inside blocks moved, norms left alone."""
    torch.manual_seed(3)
    return {
        name: value + 0.03 * torch.randn_like(value) if value.ndim == 2 and "layers" in name
        else value
        for name, value in tensors.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def changed(llama: Path, tmp_path_factory) -> Path:
    return rewritten(llama, tmp_path_factory.mktemp("changed") / "model", noisy)


@pytest.mark.parametrize("names", [(), (DOWN,), (QUERY, DOWN)])
def test_a_variant_is_the_model_with_those_weights(llama, changed, windows, tmp_path, names):
    theirs = load_file(llama / "model.safetensors")
    back = {f"{name}.weight": theirs[f"{name}.weight"] for name in names}
    mixed = rewritten(changed, tmp_path / "mixed", lambda tensors: tensors | back)
    expected = evaluate_model(open_model(mixed), windows, open_model(llama)).divergence.kl_mean
    model, original = open_model(changed), open_model(llama)
    with closing(Restorer(model, original, windows.tokens_NT, ())) as restorer:
        first = restorer.measure([frozenset(names), frozenset([QUERY])])[0]
        again = restorer.measure([frozenset(names)])[0]  # the blocks were left as they were
    assert first == pytest.approx(expected.value, rel=1e-4)
    assert first == again


def test_all_restored_is_the_original(llama, changed, windows):
    model, original = open_model(changed), open_model(llama)
    everything = frozenset(model.linear_shapes())
    with closing(Restorer(model, original, windows.tokens_NT, ())) as restorer:
        before, after = restorer.measure([frozenset(), everything])
    assert before > 1e-3
    assert after < 1e-9


def fold(tensors):
    """Twice the norm, half the columns of its readers: the function stays."""
    path = "model.layers.1."
    tensors = noisy(tensors)
    tensors[f"{path}input_layernorm.weight"] = tensors[f"{path}input_layernorm.weight"] * 2
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{path}self_attn.{name}.weight"] /= 2
    return tensors


def test_folded_blocks_are_found(llama, changed, recipe, tmp_path):
    original = open_model(llama)
    folded = open_model(rewritten(llama, tmp_path / "m", fold))
    assert folded_blocks(open_model(changed), original, recipe) == frozenset()
    assert folded_blocks(folded, original, None) == {1}
    scaled = Recipe.parse({"steps": ["awq", "rtn"]})
    assert folded_blocks(open_model(changed), original, scaled) == {0, 1, 2}


def test_a_folded_block_is_restored_whole(llama, windows, tmp_path):
    model, original = open_model(rewritten(llama, tmp_path / "m", fold)), open_model(llama)
    everything = frozenset(model.linear_shapes())
    with closing(Restorer(model, original, windows.tokens_NT, ())) as alone:
        assert alone.measure([everything])[0] > 1e-3
    with closing(Restorer(model, original, windows.tokens_NT, {1})) as whole:
        assert whole.measure([everything])[0] < 1e-9


def test_a_restored_linear_reads_unrounded_inputs(llama, windows):
    model, original = open_model(llama), open_model(llama)
    coarse = ActivationSpec.parse({"bits": 4, "granularity": "token", "dynamic": True})
    model.quantizers = {DOWN: InputQuantizer(coarse)}
    with closing(Restorer(model, original, windows.tokens_NT, ())) as restorer:
        before, after, again = restorer.measure([frozenset(), frozenset([DOWN]), frozenset()])
        other = restorer.measure([frozenset([QUERY])])[0]
    assert before > 1e-6
    assert after < 1e-9
    assert before == again
    assert other == pytest.approx(before, rel=1e-3)
