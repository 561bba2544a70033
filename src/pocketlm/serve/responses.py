"""The JSON that clients of OpenAI's API expect: whole answers, chunks of a stream, errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from pocketlm.core.errors import PocketLMError
from pocketlm.serve.requests import BadRequest, ChatRequest, Request
from pocketlm.serve.scheduler import Ask, Busy, Chance, End, TimeUp

Json = dict[str, Any]
REASONS = {"end": "stop", "stop": "stop", "length": "length", "time": "length"}


class Shape:
    """The JSON of one request's answers.

    Args:
        request: What was asked.
        asks: One for each choice.
        model: Its name.
        token_text: A token as text.
    """

    def __init__(
        self,
        request: Request,
        asks: Sequence[Ask],
        model: str,
        token_text: Callable[[int], str],
    ) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._asks, self._token_text = asks, token_text
        prefix, kind = (
            ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        )
        self._kind = kind
        self._common: Json = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], chances: Sequence[list[Chance]], ends: list[End]) -> Json:
        """All choices at once, in order."""
        choices = []
        for index, (text, told, end) in enumerate(zip(texts, chances, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choice = {"index": index, **(said if self._chat else {"text": text})}
            choices.append(choice | self._tail(told, end))
        return self._object(self._kind, choices) | {"usage": self.usage(ends)}

    def opening(self, index: int) -> Json | None:
        """What begins a choice of a stream."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self._chat else None

    def piece(self, index: int, text: str, chances: Sequence[Chance]) -> Json:
        """A part of a choice's text."""
        said: Any = {"content": text} if self._chat else text
        return self._chunk(index, said, self._logprobs(chances))

    def closing(self, index: int, end: End) -> Json:
        """The end of a choice."""
        chunk = self._chunk(index, {} if self._chat else "")
        chunk["choices"][0] |= self._tail((), end) | {"logprobs": None}
        return chunk

    def counts(self, ends: Sequence[End]) -> Json:
        """The chunk that has nothing but the token counts."""
        return self._object(self._streamed, []) | {"usage": self.usage(ends)}

    def usage(self, ends: Sequence[End]) -> Json:
        """Tokens; a prompt counts once, however many answers it gets."""
        prompt = sum(
            len(ids) for ids in {id(ask.prompt): ask.prompt for ask in self._asks}.values()
        )
        new = sum(end.tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }

    @property
    def _streamed(self) -> str:
        return self._kind + (".chunk" if self._chat else "")

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return self._common | {"object": kind, "choices": choices}

    def _chunk(self, index: int, said: Any, logprobs: Json | None = None) -> Json:
        key = "delta" if self._chat else "text"
        choice = {"index": index, key: said, "logprobs": logprobs, "finish_reason": None}
        return self._object(self._streamed, [choice])

    def _tail(self, chances: Sequence[Chance], end: End) -> Json:
        tail: Json = {
            "logprobs": self._logprobs(chances),
            "finish_reason": REASONS[end.stopped_by],
        }
        if end.stopped_by == "time":  # no reason of OpenAI's says it
            tail["stop_reason"] = "time limit"
        return tail

    def _logprobs(self, chances: Sequence[Chance]) -> Json | None:
        if self._asks[0].likeliest is None:
            return None
        if self._chat:
            return {
                "content": [
                    self._token(c.token, c.logprob)
                    | {"top_logprobs": [self._token(*pair) for pair in c.likeliest]}
                    for c in chances
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._token_text(c.token) for c in chances],
            "token_logprobs": [c.logprob for c in chances],
            "top_logprobs": [
                {self._token_text(token): value for token, value in c.likeliest} for c in chances
            ],
            "text_offset": [c.offset for c in chances],
        }

    def _token(self, token: int, logprob: float) -> Json:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def error_json(error: Exception) -> tuple[int, Json]:
    """Status and body of a failure, in OpenAI's shape."""
    if isinstance(error, BadRequest):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        return error.status, _error(error.message, kind, error.param, error.code)
    if isinstance(error, Busy):
        return 503, _error(str(error), "server_busy", None, "busy")
    if isinstance(error, TimeUp):
        return 503, _error(str(error), "timeout", None, "timeout")
    text = str(error) if isinstance(error, PocketLMError) else "an internal error; see the log."
    return 500, _error(text, "server_error", None, None)


def _error(message: str, kind: str, param: str | None, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
