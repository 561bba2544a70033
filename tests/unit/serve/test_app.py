"""The API as the openai client sees it, and as those who send nonsense do."""

import json

import openai
import pytest
from starlette.testclient import TestClient
from tests.unit.serve.conftest import HOST

from pocketlm.runtime.generate import generate
from pocketlm.serve.app import make_app

USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """The answer of the runtime alone to `USER`."""
    return generate(model, tokenizer, "[user]hello there[assistant]", chat=False, max_new_tokens=24)


def test_models_and_health(client, http):
    (only,) = client.models.list().data
    assert only.id == "tiny"
    assert only.max_model_len == 200
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_chat_is_the_runtime_s_answer(client, greedy):
    answer = client.chat.completions.create(
        model="tiny", messages=USER, temperature=0, max_tokens=24
    )
    (choice,) = answer.choices
    assert choice.message.content == greedy.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len("[user]hello there[assistant]")
    assert answer.usage.total_tokens == 24 + answer.usage.prompt_tokens


def test_chat_streams_the_same(client, greedy):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, temperature=0, max_completion_tokens=24, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == greedy.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_parts_of_a_message_are_one_text(client, greedy):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content == greedy.text


def test_completions_of_texts_and_of_ids(client, model, tokenizer):
    texts = ["one", "another prompt"]
    answer = client.completions.create(model="tiny", prompt=texts, temperature=0, max_tokens=9)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for text, choice in zip(texts, answer.choices, strict=True):
        alone = generate(model, tokenizer, text, chat=False, max_new_tokens=9)
        assert choice.text == alone.text
    by_ids = client.completions.create(
        model="tiny", prompt=[tokenizer(t)["input_ids"] for t in texts], temperature=0, max_tokens=9
    )
    assert [c.text for c in by_ids.choices] == [c.text for c in answer.choices]
    assert by_ids.usage == answer.usage
    short = client.completions.create(model="tiny", prompt="one", temperature=0)
    assert short.usage.completion_tokens == 16


def test_a_stop_string_ends_the_answer_in_both_forms(client, greedy):
    stop = greedy.text[5:8]
    before = greedy.text[: greedy.text.find(stop)]
    asked = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 24, "stop": stop}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content, whole.finish_reason) == (before, "stop")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_choices_differ(client):
    def ask(**more):
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=20, temperature=1.5, top_p=0.9, **more
        )
        return [choice.text for choice in answer.choices]

    first, second = ask(seed=7, n=2)
    assert first != second
    assert ask(seed=7) == [first]
    assert ask(seed=8) == [second]
    assert ask() != ask()


def test_logprobs_belong_to_the_text(client, greedy):
    answer = client.chat.completions.create(
        model="tiny", messages=USER, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs.content
    assert len(told) == 24
    for token in told:
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob
    chunks = client.chat.completions.create(
        model="tiny", messages=USER, temperature=0, max_tokens=24, logprobs=True, stream=True
    )
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in told]
    old = client.completions.create(
        model="tiny", prompt="x", temperature=0, max_tokens=8, logprobs=2
    ).choices[0]
    assert len(old.logprobs.tokens) == len(old.logprobs.text_offset) == 8
    assert all(max(top.values()) <= 0 for top in old.logprobs.top_logprobs)


def test_no_token_is_told_behind_a_stop_string(client, greedy):
    stop = greedy.text[5:8]
    at = greedy.text.find(stop)
    answer = client.completions.create(
        model="tiny", prompt="[user]hello there[assistant]", temperature=0, max_tokens=24,
        logprobs=0, stop=[stop],
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.text == greedy.text[:at]
    assert max(choice.logprobs.text_offset) < at


BAD = {
    "no JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b'{"model": "\xff"}',
    "no messages": {"model": "tiny"},
    "empty messages": {"model": "tiny", "messages": []},
    "a message without a role": {"model": "tiny", "messages": [{"content": "x"}]},
    "an image": {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    },
    "a role the template refuses": {
        "model": "tiny",
        "messages": [{"role": "refused", "content": "x"}],
    },
    "hot": {"model": "tiny", "messages": USER, "temperature": 3},
    "not a number": b'{"model": "tiny", "messages": [{"role": "user"}], "temperature": NaN}',
    "a word for a number": {"model": "tiny", "messages": USER, "max_tokens": "ten"},
    "no tokens": {"model": "tiny", "messages": USER, "max_tokens": 0},
    "many choices": {"model": "tiny", "messages": USER, "n": 5},
    "too long": {"model": "tiny", "messages": [{"role": "user", "content": "x" * 300}]},
    "too long an answer": {"model": "tiny", "messages": USER, "max_tokens": 190},
    "tools": {"model": "tiny", "messages": USER, "tools": [{"type": "function"}]},
    "penalty": {"model": "tiny", "messages": USER, "presence_penalty": 0.5},
    "many stops": {"model": "tiny", "messages": USER, "stop": ["a"] * 17},
    "nested": b"[" * 10_000,
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_nonsense_is_answered_400(http, body):
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(
        "/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [257]},
        {"prompt": [-1]},
        {"prompt": [[]]},
        {"prompt": "x", "echo": True},
        {"prompt": "x", "logprobs": 21},
        {"prompt": {"a": 1}},
        {"prompt": ["x"] * 5},
    ],
)
def test_nonsense_prompts_are_answered_400(http, body):
    answer = http.post("/v1/completions", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text


def test_what_is_wrong_is_named(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=USER, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="tiny", messages=USER, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{**USER[0], "content": "x" * 300}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as other:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert other.value.code == "model_not_found"


def test_other_statuses(http):
    as_json = {"Content-Type": "application/json"}
    url = "/v1/chat/completions"
    assert http.post(url, content=b"x" * 20_001, headers=as_json).status_code == 413
    assert http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert http.get(url).status_code == 405
    missing = http.get("/v2")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"
    # a page of another site that has renamed itself to this machine
    assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_unknown_keys_are_ignored(client):
    client.completions.create(
        model="tiny", prompt="x", max_tokens=1, user="me", extra_body={"chat_id": 1, "min_p": 0}
    )


def test_an_api_key_guards_the_api(service):
    http = TestClient(make_app(service, api_key="sesam"), base_url=HOST)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesam"}):
        answer = http.get("/v1/models", headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.post("/v1/completions", json={}, headers=header).status_code == 401
    right = {"Authorization": "Bearer sesam"}
    assert http.get("/v1/models", headers=right).status_code == 200
    assert http.get("/health").status_code == 200
    assert http.get("/").status_code == 200


def test_the_page_reaches_nothing_but_this_server(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/", "")
    assert "https://" not in page.text
