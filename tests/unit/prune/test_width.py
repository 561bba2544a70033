"""Heads and channels are cut together with all that they are coupled to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.prune.conftest import logits, plain

from pocketlm.core.errors import ConfigError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.transform import CHANNELS, HEADS
from pocketlm.models import open_model
from pocketlm.models.outline import ModelOutline

METHODS = ("flap", "wanda_sp", "minitron", "llm_pruner")


def outline_of(family: str) -> ModelOutline:
    return ModelOutline(open_model(build(family)))


@pytest.mark.parametrize(
    ("family", "method"), [*(("llama", method) for method in METHODS), ("mixtral", METHODS[0])]
)
def test_removes_dead_units(saved, compress, tmp_path: Path, method: str, family: str) -> None:
    """Units whose outputs are zero go first, and the function stays."""
    model = plain(saved(family))
    heads, channels = torch.tensor([0]), torch.arange(5, 21)  # one of 2 heads, 16 of 48 channels
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.view(2, 8, -1)[heads] = 0
            if family == "llama":
                layer.mlp.up_proj.weight[channels] = 0
            else:
                layer.mlp.experts.gate_up_proj[:, 48 + channels] = 0
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved(family) / name).read_bytes())
    step = {"method": method, "channels": 32, "heads": 1}
    compress(source, tmp_path / "out", step, samples=8)
    smaller = plain(tmp_path / "out")
    config = smaller.config
    assert (config.intermediate_size, config.num_key_value_heads) == (32, 1)
    assert (config.num_attention_heads, config.head_dim) == (2, 8)
    assert smaller.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "dimensions"),
    [
        ("gemma2", "both"),
        ("llama-bias-tied", "both"),
        ("phi3", CHANNELS),
        ("qwen3-moe", "both"),
        *(
            pytest.param(family, dimensions, marks=pytest.mark.slow)
            for family, dimensions in (
                ("qwen3", "both"), ("qwen2", "both"), ("gpt2", CHANNELS), ("opt", CHANNELS)
            )
        ),
    ],
)  # fmt: skip
def test_loads_in_transformers(saved, compress, tmp_path: Path, family, dimensions) -> None:
    sizes = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    both = [CHANNELS, HEADS] if dimensions == "both" else [CHANNELS]
    step = {"method": "flap", "ratio": 0.3, "multiple_of": 8, "dimensions": both}
    source, out = saved(family, **sizes), tmp_path / "out"
    compress(source, out, step)
    count = [sum(p.numel() for p in plain(path).parameters()) for path in (out, source)]
    assert count[0] < count[1]
    view = open_model(out)
    with torch.no_grad():
        hidden_BTD, call = view.begin(torch.arange(3, 27)[None])
        for index in range(len(view.block_paths)):
            with view.block(index) as block:
                hidden_BTD = block.forward(hidden_BTD, call)
        mine = view.logits(view.finish(hidden_BTD)[0])
    torch.testing.assert_close(mine, logits(plain(out)), rtol=1e-4, atol=1e-4)


def test_flap_keeps_the_mean(saved, compress, tmp_path: Path) -> None:
    """A channel that is constant is replaced by its bias, exactly."""
    model = plain(saved("llama-bias-tied"))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[7:15] = 0  # act(gate bias) · up bias
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved("llama") / name).read_bytes())
    step = {"method": "flap", "channels": 40, "dimensions": [CHANNELS]}
    compress(source, tmp_path / "with", step)
    torch.testing.assert_close(
        logits(plain(tmp_path / "with")), logits(model), rtol=1e-4, atol=1e-4
    )
    compress(source, tmp_path / "without", {**step, "compensate": False})
    assert (logits(plain(tmp_path / "without")) - logits(model)).abs().max() > 0.01


def test_flap_adds_a_bias_where_the_configuration_can_say_one(saved, compress, tmp_path) -> None:
    step = {"method": "flap", "channels": 32, "heads": 1}
    compress(saved("llama"), tmp_path / "llama", step)
    config = plain(tmp_path / "llama").config
    assert config.mlp_bias
    assert config.attention_bias
    result = compress(saved("gemma2"), tmp_path / "gemma2", {**step, "dimensions": [CHANNELS]})
    assert any("no bias" in warning for warning in result.warnings)


def test_permuted_channels_give_the_same_model(saved, compress, tmp_path: Path) -> None:
    model = plain(saved("llama"))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.copy_(linear.weight[order].clone())
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((saved("llama") / name).read_bytes())
    step = {"method": "flap", "channels": 24, "dimensions": [CHANNELS]}
    compress(saved("llama"), tmp_path / "a", step)
    compress(source, tmp_path / "b", step)
    torch.testing.assert_close(
        logits(plain(tmp_path / "a")), logits(plain(tmp_path / "b")), rtol=1e-4, atol=1e-4
    )


def test_ratio_is_a_share_of_the_blocks_weights(saved, compress, tmp_path: Path) -> None:
    source, out = saved("llama"), tmp_path / "out"
    compress(source, out, {"method": "wanda_sp", "ratio": 0.25, "multiple_of": 4})
    blocks = [
        sum(p.numel() for p in plain(path).model.layers.parameters()) for path in (source, out)
    ]
    assert abs(1 - blocks[1] / blocks[0] - 0.25) < 0.03


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [({"ratio": 0.97, "multiple_of": 16}, ConfigError, "would be left"),
     ({"channels": 49}, ConfigError, "only 48"), ({"heads": 3}, ConfigError, "only 2"),
     ({"ratio": 1.0}, ConfigError, "ratio"), ({"multiple_of": 0}, ConfigError, "multiple_of")],
)  # fmt: skip
def test_refused(saved, compress, tmp_path: Path, options, error, word: str) -> None:
    with pytest.raises(error, match=word):
        compress(saved("llama"), tmp_path / "out", {"method": "flap", **options})


def test_unloadable_width_is_refused() -> None:
    """5 heads do not divide 32 columns, which transformers' Llama asks for."""
    outline = ModelOutline(open_model(build("llama", num_attention_heads=8, num_key_value_heads=8)))
    assert outline.loadable(HEADS, 5) is not None
    structures = outline.structures(HEADS)
    with pytest.raises(UnsupportedLayer, match="cannot be loaded"):
        outline.cut({HEADS: {one.path: torch.arange(5) for one in structures}})


def test_unproved_coupling_is_refused_by_name() -> None:
    """OLMo 2 norms all heads together: a head less changes the others."""
    with pytest.raises(UnsupportedLayer, match=r"layers.0.self_attn.*cannot be proved"):
        outline_of("olmo2").structures(HEADS)


def test_wrong_coupling_is_not_proved(monkeypatch) -> None:
    """The proof tells a wrong layout from the right one: it is no formality."""
    outline = outline_of("phi3")
    couplings = outline.couplings
    monkeypatch.setattr(couplings, "_group", _as_width(couplings._group))
    with pytest.raises(UnsupportedLayer, match="cannot be proved"):
        outline.structures(CHANNELS)


def _as_width(group):
    return lambda trial, changed, layout: group(trial, changed, "width")


def test_dimension_that_the_configuration_lacks() -> None:
    with pytest.raises(UnsupportedModel, match="no heads"):
        outline_of("gpt2").structures(HEADS)


def test_all_units_refused() -> None:
    outline = outline_of("llama")
    none = {one.path: torch.arange(0) for one in outline.structures(CHANNELS)}
    with pytest.raises(ConfigError, match="above 0"):
        outline.cut({CHANNELS: none})


def test_structures_belong_to_their_block() -> None:
    """Block 10's path begins as block 1's does."""
    outline = ModelOutline(open_model(build("llama", num_hidden_layers=11)))
    for dimension in (CHANNELS, HEADS):
        structures = outline.structures(dimension)
        assert [one.block for one in structures] == list(range(11))
        assert all(f".{one.block}." in one.path for one in structures)
