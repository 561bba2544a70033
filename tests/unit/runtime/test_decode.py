"""Steps over the static cache: transformers' greedy tokens, for every family and several rows."""

import pytest
import torch
from tests.unit.models.families import FAMILIES, build

from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.sampling import Sampling

NEW = 10  # the window of 5 slides
PROMPT = [5, 9, 31, 7, 62, 11]
PLAIN = {"llama", "llama-bias-tied", "qwen2", "qwen3", "mistral-window"}


def theirs(model, ids, new=NEW):
    ids = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, ids.shape[1] :].tolist()


def ours(decoder, rows, new=NEW):
    tokens = [decoder.prefill(rows, room=new).read()]
    tokens += [decoder.step().read() for _ in range(new - 1)]
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_transformers(family):
    model = build(family)
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    assert decoder.length == len(PROMPT) + NEW - 1
    plain = not any("transformers' forward" in note for note in decoder.notes)
    assert plain == (family in PLAIN)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "olmo2", "mixtral"])
def test_rows_of_several_lengths(family):
    model = build(family)
    rows = [PROMPT, PROMPT[2:], PROMPT[1:4] * 3]
    assert ours(Decoder(model, 3), rows) == [theirs(model, row) for row in rows]
