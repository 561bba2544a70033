"""Every family's logits through the stream of blocks are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.models.families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from pocketlm.models import Model, open_model

FUSED_EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "phimoe"}  # equal up to the order of sums


def tokens(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def streamed_logits(model: Model, tokens_BT: Tensor) -> Tensor:
    hidden, call = model.begin(tokens_BT)
    for index in range(len(model.block_paths)):
        with model.block(index) as block:
            run = block.start(hidden, call)
            while run.advance() is not None:
                pass
            plain = block.forward(hidden, call)
            assert torch.equal(run.output, plain)
            hidden = plain.clone()
    finished = model.finish(hidden)
    return model.logits(finished.flatten(0, 1)).unflatten(0, tokens_BT.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, saved: Callable[..., Path]) -> None:
    directory = saved(family)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(tokens()).logits
    got = streamed_logits(open_model(directory), tokens())
    if family in FUSED_EXPERTS:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, expected)
