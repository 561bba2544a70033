"""Text out of a model: transformers' greedy answer, whole characters, stops, conversations."""

import pytest
import torch
from tests.unit.runtime.helpers import byte_llama, byte_tokenizer

from pocketlm.core.errors import ConfigError
from pocketlm.runtime.chat import Conversation
from pocketlm.runtime.generate import generate, generate_ids, prompt_ids
from pocketlm.runtime.sampling import Sampling
from pocketlm.runtime.stream_text import TextStream

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return byte_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TEMPLATE)


def test_greedy_equals_transformers(model, tokenizer):
    ids = torch.tensor([prompt_ids(tokenizer, "hello there")])
    theirs = model.generate(
        ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    ours = generate(model, tokenizer, "hello there", max_new_tokens=20, chat=False)
    assert list(ours.tokens) == theirs[0, ids.shape[1] :].tolist()
    assert ours.prompt_tokens == ids.shape[1]
    assert ours.seconds_prefill > 0
    assert ours.tokens_per_second > 0


def test_streamed_pieces_make_the_text(model, tokenizer):
    pieces = []
    result = generate(
        model, tokenizer, "x", max_new_tokens=60, temperature=1.0, on_text=pieces.append
    )
    assert "".join(pieces) == result.text
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)


def test_chat_template_is_used_unless_told_not_to(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "hi"}])) == (
        "[user]hi\n[assistant]"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, "hi")) == "hi"
    assert (
        byte_tokenizer().decode(prompt_ids(byte_tokenizer(), [{"role": "user", "content": "hi"}]))
        == "hi"
    )


@pytest.mark.parametrize("text", ["naïve café", "日本語 テキスト\nzweite Zeile", "👩‍🚀 🙂\n\n ü"])
def test_no_half_characters(tokenizer, text):
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) + stream.flush() == text


def test_broken_bytes_come_out_at_last(tokenizer):
    lone = tokenizer("é")["input_ids"][:1]
    stream = TextStream(tokenizer)
    assert stream.push(lone[0]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    stream = TextStream(tokenizer)
    assert "".join(stream.push(lone[0]) for _ in range(40)).count("\N{REPLACEMENT CHARACTER}") > 20


def test_stop_string_is_cut_and_never_shown(model, tokenizer):
    free = generate(model, tokenizer, "x", max_new_tokens=60, temperature=1.0, seed=4)
    stop = free.text[10:13]
    at = free.text.index(stop)
    pieces = []
    result = generate(
        model,
        tokenizer,
        "x",
        max_new_tokens=60,
        temperature=1.0,
        seed=4,
        stop=[stop],
        on_text=pieces.append,
    )
    assert result.stopped_by == "stop"
    assert result.text == "".join(pieces) == free.text[:at]


def test_end_token_stops(model, tokenizer):
    greedy = generate(model, tokenizer, "x", max_new_tokens=8)
    assert greedy.stopped_by == "length"
    model.generation_config.eos_token_id = [greedy.tokens[3]]
    try:
        ended = generate(model, tokenizer, "x", max_new_tokens=8)
    finally:
        model.generation_config.eos_token_id = 256
    assert ended.stopped_by == "end"
    assert ended.tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[3]) + 1]


def test_same_seed_same_answer(model, tokenizer):
    answers = [
        generate(model, tokenizer, "x", max_new_tokens=12, temperature=1.0, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_nucleus_keeps_the_likeliest_only():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    many = logits.expand(400, 4)
    assert set(Sampling(1.0, top_p=0.6).draw(many, draw).tolist()) == {0, 1}
    assert set(Sampling(1.0, top_k=3).draw(many, draw).tolist()) == {0, 1, 2}
    assert set(Sampling(1.0, top_k=3, top_p=0.5).draw(many, draw).tolist()) == {0}
    assert set(Sampling(1.0).draw(many, draw).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_values_out_of_range(model, tokenizer, wrong):
    with pytest.raises(ConfigError):
        generate(model, tokenizer, "x", **wrong)
    with pytest.raises(ConfigError, match="empty"):
        generate_ids(model, tokenizer, [])


def test_conversation_computes_only_what_is_new(model, tokenizer):
    talk = Conversation(model, tokenizer, system="be brief")
    first = talk.send("one", max_new_tokens=6)
    second = talk.send("two", max_new_tokens=6)
    whole = prompt_ids(tokenizer, talk.messages[:-1])
    assert second.prompt_tokens < len(whole) - first.prompt_tokens
    fresh = generate_ids(model, tokenizer, whole, max_new_tokens=6)
    assert fresh.tokens == second.tokens
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
