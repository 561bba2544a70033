"""Folding any scale into a block leaves what the block computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pocketlm.models import open_model

TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize(
    "family", ["llama-bias-tied", "qwen2", "gemma3", "gpt2", "opt", "gpt-neox", "mixtral"]
)
def test_folds_leave_the_block_function(saved: Callable[..., Path], family: str) -> None:
    model = open_model(saved(family, torch.bfloat16), compute_dtype=torch.float32)
    hidden, call = model.begin(TOKENS)
    generator = torch.Generator().manual_seed(0)
    with model.block(1) as block:
        expected = block.forward(hidden, call)
        groups = [g for g in block.probe_folds() if g.fold is not None and g.fold.accepted]
        assert groups
        for group in groups:
            view = block.linears[group.linears[0]]
            before = view.weight_OI()
            scale_I = torch.exp2(2 * torch.rand(view.in_features, generator=generator) - 1)
            folded = block.fold(group, scale_I, None)
            rounded = any(value.dtype != torch.float32 for value in folded.tensors.values())
            assert rounded == bool(folded.tensors)
            assert torch.allclose(view.weight_OI() / before, folded.scale_I.expand_as(before))
        # What the producer lost to its own rounding, the readers have taken over; biases cannot.
        biased = any(name.endswith(".bias") for g in groups for name in _producer(block, g))
        got = block.forward(hidden, call)
        error = (got - expected).norm() / expected.norm()
        assert error < (3e-3 if biased else 3e-6), error
        assert not torch.equal(got, expected)


def _producer(block, group) -> list[str]:
    own = dict(block.module.named_parameters())
    leaf = group.fold.producer.removeprefix(f"{block.path}.")
    return [name for name in own if name.startswith(f"{leaf}.")]


def test_a_second_fold_adds_to_the_first(saved: Callable[..., Path]) -> None:
    model = open_model(saved("llama"))
    hidden, call = model.begin(TOKENS)
    with model.block(0) as block:
        expected = block.forward(hidden, call)
        group = block.probe_folds()[0]
        scale_I = torch.linspace(0.5, 2, 32)
        first = block.fold(group, scale_I, None)
        second = block.fold(group, 1 / scale_I, None)
        (name,) = first.tensors
        assert name == "model.layers.0.input_layernorm.weight"
        assert torch.allclose(second.tensors[name], model.source.read(name))
        assert torch.allclose(block.forward(hidden, call), expected, atol=1e-5)
