"""From a checked request to what the scheduler is asked, and the limits that need a tokenizer."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocketlm.core.errors import ConfigError
from pocketlm.runtime.generate import prompt_ids
from pocketlm.runtime.sampling import Sampling
from pocketlm.serve.limits import Limits
from pocketlm.serve.requests import BadRequest, ChatRequest, CompletionRequest, Request
from pocketlm.serve.scheduler import Ask, Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEDS = 1 << 63


class Service:
    """One model under one name.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer.
        name: What clients call it.
        limits: Of the server.

    Attributes:
        name: The same.
        created: Unix time.
        vocabulary: Ids from this on are none of the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        limits: Limits,
    ) -> None:
        self.name, self.limits, self.created = name, limits, int(time.time())
        self._tokenizer = copy.deepcopy(tokenizer)  # the scheduler's thread has its own
        prompt_ids(self._tokenizer, "a")  # the first call may change it, the others only read
        self.vocabulary = model.config.get_text_config().vocab_size
        self._defaults = _default_sampling(model)
        self.scheduler = Scheduler(model, tokenizer, limits)

    def asks(self, request: Request) -> list[Ask]:
        """What a request wants, one for each answer; tokenizes, so not for the event loop's thread.

        Raises:
            BadRequest: If it names another model, or does not fit the limits.
        """
        if request.model != self.name:
            raise BadRequest(
                f"the model '{request.model}' is not served; '{self.name}' is.",
                param="model",
                code="model_not_found",
                status=404,
            )
        if isinstance(request, CompletionRequest):
            prompts, param = [self._text_ids(prompt) for prompt in request.prompts], "prompt"
        else:
            assert isinstance(request, ChatRequest)
            prompts, param = [self._chat_ids(request)], "messages"
        n = request.n or 1
        if n * len(prompts) > self.limits.choices:
            raise BadRequest(
                f"{n * len(prompts)} answers are more than {self.limits.choices}.", param="n"
            )
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS
        return [
            Ask(
                prompt=ids,
                max_tokens=self._room(len(ids), request.most_tokens, param),
                sampling=self._sampling(request),
                seed=(seed + choice) % SEEDS,
                stop=request.stops,
                likeliest=request.likeliest,
            )
            for ids in map(tuple, prompts)
            for choice in range(n)
        ]

    def token_text(self, token: int) -> str:
        """A token alone as text; half a character is U+FFFD."""
        return str(self._tokenizer.decode([token]))

    def _text_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            if max(prompt) >= self.vocabulary:
                raise BadRequest(
                    f"{max(prompt)} is no id of {self.vocabulary:,} tokens.", param="prompt"
                )
            return list(prompt)
        ids = prompt_ids(self._tokenizer, prompt)
        if not ids:
            raise BadRequest("the prompt is empty.", param="prompt")
        return ids

    def _chat_ids(self, request: ChatRequest) -> list[int]:
        try:
            ids = prompt_ids(self._tokenizer, [message.plain() for message in request.messages])
        except Exception as error:  # templates are the model's: they may raise anything
            raise BadRequest(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        if not ids:
            raise BadRequest("the messages are empty.", param="messages")
        return ids

    def _room(self, prompt: int, wanted: int | None, param: str) -> int:
        """Tokens that the answer may have."""
        room = self.limits.positions - prompt
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and {wanted:,} of the answer"
            raise BadRequest(
                f"{prompt:,} tokens of the prompt{asked} are more than the "
                f"{self.limits.positions:,} that fit.",
                param=param if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return room if wanted is None else wanted

    def _sampling(self, request: Request) -> Sampling:
        own = self._defaults
        top_k = own.top_k if request.top_k is None else max(0, request.top_k)
        try:
            return Sampling(
                own.temperature if request.temperature is None else request.temperature,
                min(top_k, self.vocabulary),
                own.top_p if request.top_p is None else request.top_p,
            )
        except ConfigError as error:
            raise BadRequest(str(error), param=error.where) from error


def _default_sampling(model: PreTrainedModel) -> Sampling:
    """Where a request says nothing: as the model's generation_config.json has it, else OpenAI's."""
    own = model.generation_config
    if own is None or not own.do_sample:
        return Sampling(temperature=1.0)
    return Sampling(
        1.0 if own.temperature is None else own.temperature,
        own.top_k or 0,
        1.0 if own.top_p is None else own.top_p,
    )
