"""Groups and folds found by running blocks, and what an inspection says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pocketlm.models import open_model
from pocketlm.models.inspect import inspect_model
from pocketlm.models.observe import ValueNumbers, observe

# Per family: each group's linears, and the fold: producer and form, "!" where it is refused.
EXPECTED = {
    "llama": [
        ("q_proj k_proj v_proj", "input_layernorm weight"),
        ("o_proj", "v_proj linear"),
        ("gate_proj up_proj", "post_attention_layernorm weight"),
        ("down_proj", "up_proj linear"),
    ],
    "gemma2": [
        ("q_proj k_proj v_proj", "input_layernorm one_plus_weight"),
        ("o_proj", "v_proj linear"),
        ("gate_proj up_proj", "pre_feedforward_layernorm one_plus_weight"),
        ("down_proj", "up_proj linear"),
    ],
    "olmo2": [
        ("q_proj k_proj v_proj", None),
        ("o_proj", "v_proj linear"),
        ("gate_proj up_proj", None),
        ("down_proj", "up_proj linear"),
    ],
    "opt": [  # positive scales pass through ReLU
        ("q_proj k_proj v_proj", "self_attn_layer_norm weight"),
        ("out_proj", "v_proj linear"),
        ("fc1", "final_layer_norm weight"),
        ("fc2", "fc1 linear"),
    ],
    "gpt2": [
        ("c_attn", "ln_1 weight"),
        ("c_proj", None),
        ("c_fc", "ln_2 weight"),
        ("c_proj", "!c_fc linear"),
    ],
    "phi3": [
        ("qkv_proj", "input_layernorm weight"),
        ("o_proj", None),
        ("gate_up_proj", "post_attention_layernorm weight"),
        ("down_proj", None),
    ],
    "falcon-parallel": [  # attention and MLP read one norm
        ("query_key_value dense_h_to_4h", "input_layernorm weight"),
        ("dense", None),
        ("dense_4h_to_h", "!dense_h_to_4h linear"),
    ],
    "falcon-new": [
        ("query_key_value", "ln_attn weight"),
        ("dense", None),
        ("dense_h_to_4h", "ln_mlp weight"),
        ("dense_4h_to_h", "!dense_h_to_4h linear"),
    ],
    "mixtral": [  # the router reads the norm too, so nothing can move there
        ("q_proj k_proj v_proj", "input_layernorm weight"),
        ("o_proj", "v_proj linear"),
        *[("w1 w3", None), ("w2", "w3 linear")] * 4,
    ],
}


def last(path: str) -> str:
    return path.rpartition(".")[2]


@pytest.mark.parametrize("family", EXPECTED)
def test_groups_and_folds(family: str, saved: Callable[..., Path]) -> None:
    model = open_model(saved(family))
    with model.block(1) as block:
        weights = {name: linear.weight_OI() for name, linear in block.linears.items()}
        groups = block.probe_folds()
        assert all(
            torch.equal(linear.weight_OI(), weights[n]) for n, linear in block.linears.items()
        )
    found = []
    for group in groups:
        fold = group.fold
        text = None
        if fold is not None:
            assert fold.error is not None
            assert fold.accepted == (fold.error < 1e-9)
            text = f"{'' if fold.accepted else '!'}{last(fold.producer)} {fold.form}"
        found.append((" ".join(last(name) for name in group.linears), text))
    assert found == EXPECTED[family]
    names = [name for group in groups for name in group.linears]
    own = [name for name in model.linear_shapes() if name.startswith(f"{model.block_paths[1]}.")]
    assert sorted(names) == sorted(own)
    with model.block(2) as block:  # one trial serves all blocks of a layout
        assert [g.fold and g.fold.accepted for g in block.groups] == [
            g.fold and g.fold.accepted for g in groups
        ]
        assert all("2" in g.fold.producer for g in block.groups if g.fold)


def test_every_linear_is_in_exactly_one_group(saved: Callable[..., Path]) -> None:
    model = open_model(saved("qwen3-moe"))
    grouped: list[str] = []
    for index in range(3):
        with model.block(index) as block:
            grouped += [name for group in block.groups for name in group.linears]
            assert list(block.linears) == [n for g in block.groups for n in g.linears]
    assert sorted(grouped) == sorted(model.linear_shapes())


class Odd(nn.Module):
    """Views, casts and in-place changes around linears."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdef":
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view = x.view(-1, 8)
        y = self.a(x) + self.b(view.double().float()).view_as(x)
        x = x.clone()
        z = self.c(x)  # a copy is the same value
        x += 1
        z = z + self.d(x)  # changed in place: another value
        return y + z + self.e(x.transpose(0, 1)).transpose(0, 1)


def test_views_and_casts_are_the_same_value() -> None:
    module = Odd()
    seen = observe(dict(module.named_children()), module, lambda: module(torch.randn(2, 3, 8)))
    assert seen.groups == [["a", "b", "c"], ["d"], ["e"]]
    assert seen.idle == ["f"]


def test_a_slice_is_another_value() -> None:
    numbers = ValueNumbers()
    x = torch.randn(4, 8)
    with numbers:
        assert numbers.number(x[:2]) != numbers.number(x)
        assert numbers.number(x.view(2, 16)) == numbers.number(x)


def test_inspection(saved: Callable[..., Path]) -> None:
    model = open_model(saved("qwen3-moe"))
    found = inspect_model(model)
    assert found.architecture == "Qwen3MoeForCausalLM"
    assert [layout.blocks for layout in found.layouts] == [[0, 2], [1]]
    experts = found.layouts[0].groups[2]
    assert experts.count == 6
    assert experts.linears == {
        "model.layers.*.mlp.experts.*.gate_proj": (24, 32),
        "model.layers.*.mlp.experts.*.up_proj": (24, 32),
    }
    assert found.left_out["model.layers.*.mlp.gate"] == "router"
    assert found.parameters == sum(share.parameters for share in found.shares.values())
    elements = sum(o * i for o, i in model.linear_shapes().values())
    assert found.shares["linears"].parameters == elements
    assert found.shares["embedding"].parameters == found.shares["head"].parameters == 96 * 32
    assert found.model_dump_json()


def test_inspection_without_running(saved: Callable[..., Path]) -> None:
    found = inspect_model(open_model(saved("llama-bias-tied")), probe=False)
    assert found.tied
    assert "head" not in found.shares
    assert [layout.groups for layout in found.layouts] == [[]]
