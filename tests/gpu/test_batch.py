"""Rows that join and leave on CUDA: replayed graphs of several sizes, against plain steps alone."""

import pytest
from tests.unit.models.families import build
from tests.unit.runtime.test_batch import LENGTHS, PROMPTS, alone, together

from pocketlm.runtime.batch import Batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma3", "mixtral"])
def test_rows_get_the_tokens_that_they_get_alone(family):
    model = build(family, head_dim=16).to("cuda")
    truth = [alone(model, *pair) for pair in zip(PROMPTS, LENGTHS, strict=True)]
    written, seen = together(model, 6)
    assert written == truth
    assert max(seen) > 4


def test_graphs_are_kept_for_few_numbers_of_rows():
    model = build("llama", head_dim=16).to("cuda")
    batch = Batch(model, 20)
    for count in range(1, 21):
        batch.join([5, 9, 31, 7, 62, 11])
        batch.advance([3] * count)
    assert {key[0] for key in batch._graphs} == {1, 4, 16, 20}
    assert "CUDA graph" in batch.loop
