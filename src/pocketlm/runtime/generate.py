"""Writes text with a loaded model: prefill, then token by token, streamed and timed apart.

The loop over a Decoder; greedy by default, and then equal to transformers' `generate` with the same
weights. A stop string is cut off the answer; an end-of-text token stops without appearing in it. On
CUDA one step is under way while the last one's token becomes text; what it computed past the end is
dropped. No beams or penalties: `model.generate` has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocketlm.core.errors import ConfigError
from pocketlm.runtime.answer import Answer
from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.sampling import Sampling
from pocketlm.runtime.stream_text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_AS = "_pocketlm_decoder"


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
    top_k: int = 0,
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
        top_k: So many of the likeliest tokens to draw from; 0 for all.
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
        top_k=top_k,
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


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    **options: Any,
) -> GenerationResult:
    """Continues token ids.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer.
        ids: The whole prompt.
        **options: As `generate_rows` takes them; `on_text` gets the text alone.

    Returns:
        The answer.

    Raises:
        ConfigError: If a value is out of range or the prompt is empty.
    """
    on_text = options.pop("on_text", None)
    if on_text is not None:
        options["on_text"] = lambda _, text: on_text(text)
    return generate_rows(model, tokenizer, [ids], **options)[0]


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    decoder: Decoder | None = None,
) -> list[GenerationResult]:
    """Continues several prompts at once; a row that has ended waits for the others.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer.
        rows: Ids of each prompt.
        max_new_tokens: The most tokens to write, for each.
        temperature: 0 for greedy.
        top_k: So many of the likeliest tokens to draw from; 0 for all.
        top_p: Nucleus to draw from.
        seed: For drawing.
        stop: Strings that end an answer.
        on_text: Called with a row's index and each piece of its text as it becomes final.
        decoder: Holds the keys and values of a true prefix of the only row; is extended by
            everything but the last new token. None: the model's own, begun anew.

    Returns:
        The answers, in order.

    Raises:
        ConfigError: If a value is out of range or a prompt is empty.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} is below 1.", where="max_new_tokens")
    if not rows or not all(rows):
        raise ConfigError("is empty.", where="prompt")
    if decoder is None:
        decoder = decoder_for(model, len(rows))
        decoder.cut(0)
    held = decoder.length
    decoder.restart(sampling, seed)
    ends = end_tokens(model, tokenizer)
    answers = [
        Answer(TextStream(tokenizer, ids), ends, tuple(stop), _for_row(on_text, row))
        for row, ids in enumerate(rows)
    ]
    started = time.perf_counter()
    newest = decoder.prefill([ids[held:] for ids in rows], room=max_new_tokens)
    ids_B, first_at, count = newest.read(), time.perf_counter(), 1
    while _push(answers, ids_B) and count < max_new_tokens:
        if count == 1 or not decoder.runs_ahead:
            newest = decoder.step()
        ahead = decoder.step() if decoder.runs_ahead and count + 1 < max_new_tokens else newest
        ids_B, newest, count = newest.read(), ahead, count + 1
    for answer in answers:
        answer.finish()
    done = time.perf_counter()
    longest = max(map(len, rows))
    decoder.cut(longest + count - 1)
    return [
        GenerationResult(
            answer.text,
            tuple(answer.tokens),
            len(ids) - held,
            first_at - started,
            done - first_at,
            answer.stopped_by,
        )
        for ids, answer in zip(rows, answers, strict=True)
    ]


def decoder_for(model: PreTrainedModel, rows: int) -> Decoder:
    """The model's decoder: its cache and its graphs outlive a call; one number of rows at a time.

    It is kept as an attribute of the model and dies with it.
    """
    found = model.__dict__.get(KEPT_AS)
    if found is None or found.rows != rows:
        model.__dict__.pop(KEPT_AS, None)  # before the next takes memory
        found = model.__dict__[KEPT_AS] = Decoder(model, rows)
    return found


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: those of the generation defaults and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(configured if isinstance(configured, list) else [configured])
    ends.add(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return frozenset(int(end) for end in ends if end is not None)


def _push(answers: Sequence[Answer], ids: Sequence[int]) -> bool:
    """Hands each row its token; False where all have ended."""
    for answer, token in zip(answers, ids, strict=True):
        if answer.stopped_by == "length":
            answer.push(token)
    return any(answer.stopped_by == "length" for answer in answers)


def _for_row(on_text: Callable[[int, str], None] | None, row: int) -> Callable[[str], None] | None:
    return None if on_text is None else lambda text: on_text(row, text)
