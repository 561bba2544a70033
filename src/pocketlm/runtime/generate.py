"""Writes text with a loaded model: prefill, then token by token, streamed and timed apart.

A plain loop over the model's forward with transformers' own cache; greedy by default, and then
equal to transformers' `generate` with the same weights. A stop string is cut off the answer; an
end-of-text token stops without appearing in it. No beams or penalties: `model.generate` has them.

Legend: T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pocketlm.core.errors import ConfigError
from pocketlm.runtime.sampling import check_sampling, next_token
from pocketlm.runtime.stream_text import TextStream

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerationResult:
    """An answer and how long it took.

    Attributes:
        text: The answer, stop strings cut off.
        tokens: Ids of all new tokens, an end-of-text token included.
        prompt_tokens: Tokens of the prompt that were computed (not those a cache already held).
        seconds_prefill: Until the first new token was known.
        seconds_decode: For the tokens after the first.
        stopped_by: ``end``, ``stop`` or ``length``.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds_prefill: float
    seconds_decode: float
    stopped_by: str

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding; 0 where there was nothing after the first token."""
        return (len(self.tokens) - 1) / self.seconds_decode if self.seconds_decode > 0 else 0.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Answers a prompt.

    Args:
        model: From `load`, or any causal language model of transformers.
        tokenizer: Its tokenizer.
        prompt: What to answer or to continue.
        max_new_tokens: The most tokens to write.
        temperature: 0 for greedy.
        top_p: Nucleus to draw from.
        seed: For drawing; the same seed gives the same answer.
        stop: Strings that end the answer.
        chat: Whether the prompt goes through the tokenizer's chat template, if it has one.
        on_text: Called with each piece of text as it becomes final.

    Returns:
        The answer.

    Raises:
        ConfigError: If a value is out of range or the prompt is empty.
    """
    ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
    return generate_ids(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        on_text=on_text,
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids of a text, or of messages through the chat template.

    Args:
        tokenizer: Of the model.
        prompt: A text to continue, or messages with `role` and `content`. Without a chat template
            the messages' contents are joined by line ends.
    """
    if not isinstance(prompt, str):
        if tokenizer.chat_template:
            messages = [dict(message) for message in prompt]
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        prompt = "\n".join(message["content"] for message in prompt)
    return list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    cache: Cache | None = None,
) -> GenerationResult:
    """Continues token ids; see `generate`.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer.
        ids: The whole prompt.
        max_new_tokens: The most tokens to write.
        temperature: 0 for greedy.
        top_p: Nucleus to draw from.
        seed: For drawing.
        stop: Strings that end the answer.
        on_text: Called with each piece of text as it becomes final.
        cache: Holds the keys and values of a true prefix of `ids`, or nothing yet; is extended by
            everything but the last new token.

    Returns:
        The answer.

    Raises:
        ConfigError: If a value is out of range or the prompt is empty.
    """
    check_sampling(temperature, top_p, max_new_tokens)
    if not ids:
        raise ConfigError("is empty.", where="prompt")
    generator = torch.Generator().manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    answer = _Answer(TextStream(tokenizer, ids), tuple(stop), on_text)
    held = cache.get_seq_length() if cache is not None else 0
    feed = torch.tensor([list(ids[held:])], device=model.device)
    inputs: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    tokens: list[int] = []
    started = first_at = time.perf_counter()
    stopped_by = "length"
    while len(tokens) < max_new_tokens:
        out = model(feed, use_cache=True, logits_to_keep=1, **inputs)
        token = next_token(out.logits[0, -1], temperature, top_p, generator)
        if not tokens:
            first_at = time.perf_counter()
        tokens.append(token)
        if token in ends:
            stopped_by = "end"
            break
        if answer.push(token):
            stopped_by = "stop"
            break
        inputs = {"past_key_values": out.past_key_values}
        feed = torch.tensor([[token]], device=model.device)
    text = answer.finish()
    done = time.perf_counter()
    return GenerationResult(
        text, tuple(tokens), len(ids) - held, first_at - started, done - first_at, stopped_by
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: those of the generation defaults and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(configured if isinstance(configured, list) else [configured])
    ends.add(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return frozenset(int(end) for end in ends if end is not None)


class _Answer:
    """The text so far; holds back what could be the beginning of a stop string."""

    def __init__(
        self, stream: TextStream, stop: tuple[str, ...], on_text: Callable[[str], None] | None
    ) -> None:
        self._stream, self._stop, self._on_text = stream, stop, on_text
        self._text, self._shown = "", 0
        self._stopped = False

    def push(self, token: int) -> bool:
        """Takes a token; True where a stop string is complete."""
        self._text += self._stream.push(token)
        return self._cut() or self._show(hold=True)

    def finish(self) -> str:
        """The whole answer; shows what was held back."""
        if not self._stopped:
            self._text += self._stream.flush()
            self._cut()
        self._show(hold=False)
        return self._text

    def _cut(self) -> bool:
        places = [at for at in map(self._text.find, self._stop) if at >= 0]
        if places:
            self._text, self._stopped = self._text[: min(places)], True
        return self._stopped

    def _show(self, *, hold: bool) -> bool:
        final = len(self._text)
        if hold:
            final -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        if final > self._shown:
            if self._on_text is not None:
                self._on_text(self._text[self._shown : final])
            self._shown = final
        return False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
