"""Rows that join and leave a batch get the tokens that they get alone."""

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.runtime.helpers import convolutional

from pocketlm.runtime import batch as batch_module
from pocketlm.runtime.batch import Batch
from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.lean import LeanStep

PROMPTS = [[5, 9, 31, 7, 62, 11], [9, 31, 7], [8] * 11, [5, 9, 31, 8], [40, 3], [17, 4, 2, 2, 77]]
LENGTHS = [9, 4, 12, 7, 14, 5]
FAMILIES = ["llama", "mistral-window", "gemma3", "qwen3", "mixtral"]


def alone(model, prompt, count):
    decoder = Decoder(model, lean=False)
    tokens = [decoder.prefill([prompt], room=count).read()[0]]
    return tokens + [decoder.step().read()[0] for _ in range(count - 1)]


def together(model, most, prompts=PROMPTS, lengths=LENGTHS):
    """Each joins as soon as there is room, one between two steps; the longest first to leave."""
    batch, waiting = Batch(model, most), list(range(len(prompts)))
    rows, written = [], {i: [] for i in waiting}
    seen = set()
    while waiting or rows:
        if waiting and len(rows) < batch.most:
            rows.append(waiting.pop(0))
            written[rows[-1]].append(int(batch.join(prompts[rows[-1]]).argmax()))
        for row in reversed(range(len(rows))):
            if len(written[rows[row]]) == lengths[rows[row]]:
                batch.leave(row)
                rows[row] = rows[-1]
                rows.pop()
        assert batch.active == len(rows)
        if rows:
            logits = batch.advance([written[i][-1] for i in rows])
            for i, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                written[i].append(token)
            seen.add(len(rows))
    return [written[i] for i in range(len(prompts))], seen


def notes_of(model):
    batch = Batch(model, 6)
    for prompt in PROMPTS[:5]:
        batch.join(prompt)
        batch.advance([3] * batch.active)
    return batch.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_get_the_tokens_that_they_get_alone(family):
    model = build(family)
    truth = [alone(model, *pair) for pair in zip(PROMPTS, LENGTHS, strict=True)]
    written, seen = together(model, 6)
    assert written == truth
    assert max(seen) > 4  # both sides of the step in C
    assert not any("is not used" in note for note in notes_of(model))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_few_and_many_rows_have_a_step_each_that_stays(family):
    model = build(family)
    batch = Batch(model, 6)
    steps = []
    for prompt in PROMPTS[:6]:
        batch.join(prompt)
        batch.advance([3] * batch.active)
        steps.append(batch._lean)
    assert len({id(step) for step in steps[:4]}) == 1
    assert steps[4] is steps[5] is not steps[3]
    assert type(steps[4]) is LeanStep
    for _ in range(3):
        batch.leave(0)
        batch.advance([3] * batch.active)
    assert batch._lean is steps[0] is not None


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_move_left_when_the_longest_has_gone(family, monkeypatch):
    monkeypatch.setattr(batch_module, "CAPACITY_STEP", 4)
    model = build(family)
    prompts, lengths = PROMPTS * 3, [7, 3, 9, 5, 11, 4] * 3
    truth = [alone(model, *pair) for pair in zip(prompts, lengths, strict=True)]
    assert together(model, 3, prompts, lengths)[0] == truth


def test_the_cache_grows_with_the_longest_row_only():
    model = build("llama", max_position_embeddings=1024)
    long = [3 + i % 90 for i in range(250)]
    batch = Batch(model, 4)
    rows = [[int(batch.join(prompt).argmax())] for prompt in (long, PROMPTS[0])]
    for _ in range(10):
        for row, token in zip(rows, batch.advance([r[-1] for r in rows]).argmax(-1), strict=True):
            row.append(int(token))
    assert rows == [alone(model, long, 11), alone(model, PROMPTS[0], 11)]
    assert batch._cache.capacity == 512
    batch.leave(0)
    for _ in range(300):
        batch.advance([4])
    assert batch._cache.capacity == 512
    assert batch.length < 400
    config, width = model.config, model.model.layers[0].self_attn.head_dim
    one = 2 * 4 * config.num_key_value_heads * width  # keys and values in float32
    assert batch.position_bytes() == config.num_hidden_layers * one


def test_a_prompt_that_begins_alike_is_not_computed_again():
    model = build("llama")
    batch, computed = Batch(model, 2), []
    forward = batch._prompts._forward
    batch._prompts._forward = lambda ids: computed.append(ids.shape[1]) or forward(ids)
    first = batch.join(PROMPTS[0]).clone()
    second = batch.join([*PROMPTS[0][:4], 1, 1]).clone()
    assert computed == [6, 2]
    again = Batch(model, 1).join([*PROMPTS[0][:4], 1, 1])
    assert torch.allclose(second, again, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-2)


def test_other_state_runs_one_row_at_a_time():
    model = convolutional()
    truth = [alone(model, *pair) for pair in zip(PROMPTS, LENGTHS, strict=True)]
    written, seen = together(model, 6)
    assert (written, seen) == (truth, {1})
