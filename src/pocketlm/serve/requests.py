"""What clients of OpenAI's API send, checked; and what of it is not done here, said.

Keys that nobody knows are ignored, as other servers do; a known one that asks for something that is
not done here (tools, penalties, images) is refused where it would change the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Key → values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
MAX_STOPS = 16


@dataclass(eq=False)
class BadRequest(Exception):
    """A request that cannot be answered; becomes OpenAI's error object.

    Attributes:
        message: What is wrong, and what to do.
        param: The key that is, if one is.
        code: A word for programs.
        status: Of HTTP.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400


class StreamOptions(BaseModel):
    """What a stream tells beside text."""

    include_usage: bool = False


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation; the model's template decides which roles there are."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        if isinstance(self.content, list):
            return {"role": self.role, "content": "".join(part.text for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class Request(BaseModel):
    """What both kinds of completions share.

    Attributes:
        model: As `/v1/models` names it.
        max_tokens: The most to write.
        temperature: 0 for greedy; None: the model's default.
        top_p: Nucleus to draw from; None: the model's default.
        top_k: So many of the likeliest tokens to draw from; None: the model's default, 0: all.
        seed: For drawing; None: another one each time.
        stop: Strings that end the answer.
        n: Answers wanted; each has the next seed.
        stream: Whether text comes as it is written.
        stream_options: What comes with it.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _done_here(self) -> Request:
        for key, value in (self.model_extra or {}).items():
            if key in NOT_DONE and value not in NOT_DONE[key]:
                raise BadRequest(
                    f"'{key}' is not done by this server.", param=key, code="unsupported_parameter"
                )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, empty ones left out."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(string for string in stop if string)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def likeliest(self) -> int | None:
        """So many log-probabilities beside each token; None: none are told."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The most to write; None: as many as there is room for."""
        return self.max_tokens


class ChatRequest(Request):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def likeliest(self) -> int | None:
        """As the base says."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """The newer key, or the older."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """Of `/v1/completions`."""

    prompt: str | Ids | Texts | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def likeliest(self) -> int | None:
        """As the base says."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        """OpenAI's default is 16."""
        return self.max_tokens or 16

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """Reads a request.

    Args:
        kind: ChatRequest or CompletionRequest.
        body: JSON.

    Raises:
        BadRequest: Naming the first key that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"] if not _is_type_name(str(part))]
        param = ".".join(place) or None
        what = first["msg"] if param is None else f"'{param}': {first['msg']}."
        raise BadRequest(what, param=param, code="invalid_value") from error


def _is_type_name(part: str) -> bool:
    """Whether pydantic put it there to say which member of a union it tried."""
    return part == "str" or "[" in part
