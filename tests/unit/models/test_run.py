"""Runs stop before each group, use the weight set meanwhile, and free what they hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.models.test_families import tokens
from torch import Tensor

from pocketlm.models import Model, open_model


@pytest.fixture
def model(saved: Callable[..., Path]) -> Model:
    return open_model(saved("llama"))


def test_pauses_give_what_the_linears_read(model: Model) -> None:
    hidden, call = model.begin(tokens())
    read: dict[str, Tensor] = {}
    with model.block(1) as block:
        for name, linear in block.linears.items():
            linear.module.register_forward_pre_hook(
                lambda _, args, name=name: read.__setitem__(name, args[0])
            )
        run = block.start(hidden, call)
        seen = []
        while (pause := run.advance()) is not None:
            seen.append(pause.group)
            inputs = pause.inputs
            group = block.groups[pause.group]
            assert not set(group.linears) & read.keys()  # none of them has been computed
        assert seen == [0, 1, 2, 3]
        assert torch.equal(inputs, read[block.groups[3].linears[0]])
        assert set(read) == set(block.linears)
        assert run.advance() is None


def test_a_weight_set_during_a_pause_is_used(model: Model) -> None:
    hidden, call = model.begin(tokens())
    with model.block(0) as block:
        linear = block.linears["model.layers.0.mlp.down_proj"]
        original_OI = linear.weight_OI()
        weight_OI = torch.randn(linear.out_features, linear.in_features)
        run = block.start(hidden, call)
        while (pause := run.advance()) is not None:
            if linear.name in block.groups[pause.group].linears:
                linear.set_weight_OI(weight_OI)
        assert torch.equal(linear.weight_OI(), original_OI)
        assert torch.equal(run.output, block.forward(hidden, call))


def test_interleaved_runs_do_not_disturb_each_other(model: Model) -> None:
    batches = [model.begin(tokens(rows, 12)) for rows in (1, 2, 3)]
    with model.block(2) as block:
        expected = [block.forward(hidden, call) for hidden, call in batches]
        runs = [block.start(hidden, call) for hidden, call in batches]
        for group in range(len(block.groups)):
            pauses = [run.advance() for run in reversed(runs)]
            assert [pause.group for pause in pauses if pause is not None] == [group] * 3
        assert [run.advance() for run in runs] == [None] * 3
        assert all(torch.equal(r.output, e) for r, e in zip(runs, expected, strict=True))


def test_a_dropped_run_frees_its_activations(model: Model) -> None:
    hidden, call = model.begin(tokens())
    gc.collect()
    gc.disable()  # reference counts alone must do it
    try:
        with model.block(0) as block:
            run = block.start(hidden.clone(), call)
            run.advance()
            pause = run.advance()
            assert pause is not None
            held = weakref.ref(pause.inputs)
            runner = weakref.ref(run._runner)
            del pause
            assert held() is not None
            del run
            assert held() is None
            assert runner() is None
    finally:
        gc.enable()


def test_a_finished_run_keeps_only_its_output(model: Model) -> None:
    hidden, call = model.begin(tokens())
    with model.block(0) as block:
        start = hidden.clone()
        held = weakref.ref(start)
        run = block.start(start, call)
        del start
        while run.advance() is not None:
            pass
        gc.collect()
        assert held() is None
        assert run.output.shape == hidden.shape


def test_gradient_mode_is_left_as_it_was(model: Model) -> None:
    hidden, call = model.begin(tokens())
    with model.block(0) as block:
        run = block.start(hidden, call)
        for _ in range(3):
            run.advance()
            assert torch.is_grad_enabled()
        with torch.no_grad():
            run.advance()
            assert not torch.is_grad_enabled()


def test_an_error_inside_the_block_reaches_the_caller(model: Model) -> None:
    _, call = model.begin(tokens())
    with model.block(0) as block:
        run = block.start(torch.zeros(1, 2, 7), call)
        with pytest.raises(RuntimeError, match="size of tensor"):
            run.advance()


def test_experts_without_tokens_are_skipped(saved: Callable[..., Path]) -> None:
    model = open_model(saved("mixtral"))
    hidden, call = model.begin(tokens(1, 1))
    with model.block(0) as block:
        assert len(block.groups) == 2 + 2 * 4
        run = block.start(hidden, call)
        seen = []
        while (pause := run.advance()) is not None:
            seen.append(pause.group)
            assert pause.inputs.shape[-2] == 1
    assert len(seen) == 2 + 2 * 2  # one token, two experts
    assert seen == sorted(seen)
