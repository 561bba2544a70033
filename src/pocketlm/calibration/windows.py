"""Texts become token windows of one length: sampled ones to calibrate, successive ones to evaluate.

Calibration: the text is cut at line ends into pieces of about one window, the pieces are shuffled
by the seed and packed, so that windows hold real running text from all over the set and only what
is used is tokenized. Evaluation: the first non-overlapping windows of the joined text.
A window starts with the tokenizer's BOS only where the tokenizer itself adds one.

Legend: N windows, T tokens of a window.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.calibration.health import TextHealth, text_health, token_health
from pocketlm.calibration.texts import TextSet
from pocketlm.calibration.tokens import Tokenizer, encode, prefix_ids
from pocketlm.core.errors import CalibrationError, ConfigError

CHARACTERS_PER_TOKEN = 4  # of English prose; only sets the length of pieces
TAIL_TOKENS = 64  # at the end of a cut text, where the cut may have changed the tokens


@dataclass(frozen=True)
class Windows:
    """Token windows and where they come from.

    Attributes:
        tokens_NT: int64 ids.
        text_name: As `TextSet` names it.
        text_sha256: Of the joined text.
        bos: Whether each window starts with the tokenizer's BOS.
        seed: Of the sampling; None for successive windows.
        notes: What a user must be told: fewer or shorter windows than asked.
        health: What they are made of; None for evaluation.
    """

    tokens_NT: Tensor
    text_name: str
    text_sha256: str
    bos: bool
    seed: int | None
    notes: tuple[str, ...] = ()
    health: TextHealth | None = None

    @property
    def sha256(self) -> str:
        """Hex digest of the ids, shape included."""
        shape = repr(tuple(self.tokens_NT.shape)).encode()
        return hashlib.sha256(shape + self.tokens_NT.contiguous().numpy().tobytes()).hexdigest()


def token_windows(
    tokenizer: Tokenizer,
    text: TextSet,
    samples: int,
    seq_len: int,
    seed: int = 0,
    context: int | None = None,
) -> Windows:
    """Samples windows to calibrate on.

    Args:
        tokenizer: The model's.
        text: Where they come from.
        samples: Windows wanted.
        seq_len: Tokens of each.
        seed: Same seed, same windows.
        context: The model's longest position; a longer `seq_len` is cut to it and announced.

    Returns:
        At most `samples` windows; fewer are announced in `notes`.

    Raises:
        CalibrationError: If the text does not fill one window.
        ConfigError: If `samples` or `seq_len` is not positive.
    """
    seq_len, notes = window_length(samples, seq_len, context)
    pieces = _pieces(text, seq_len * CHARACTERS_PER_TOKEN)
    random.Random(seed).shuffle(pieces)
    prefix = prefix_ids(tokenizer)
    packed = _pack(encode(tokenizer, pieces), prefix, samples, seq_len)
    tokens_NT = _tensor(packed, seq_len, text)
    if len(packed.rows) < samples:
        notes.append(
            f"calibration on {len(packed.rows)} windows of {seq_len} tokens, not {samples}: "
            f"{text.name} has {packed.seen} tokens."
        )
    health = token_health(tokens_NT, tokenizer.all_special_ids, bool(prefix))
    health = text_health(health, text, packed.joined, seq_len * CHARACTERS_PER_TOKEN)
    notes = [*text.notes, *notes, *health.remarks()]
    return Windows(tokens_NT, text.name, text.sha256, bool(prefix), seed, tuple(notes), health)


def eval_windows(
    tokenizer: Tokenizer,
    text: TextSet,
    seq_len: int,
    limit: int | None = None,
    context: int | None = None,
) -> Windows:
    """The first non-overlapping windows of the joined text.

    Args:
        tokenizer: The model's.
        text: Where they come from.
        seq_len: Tokens of each window, the BOS included where there is one.
        limit: Windows at most; None: as many as the text fills.
        context: The model's longest position; a longer `seq_len` is cut to it and announced.

    Returns:
        The windows; fewer than `limit` are announced in `notes`.

    Raises:
        CalibrationError: If the text does not fill one window.
        ConfigError: If `limit` or `seq_len` is not positive.
    """
    seq_len, notes = window_length(1 if limit is None else limit, seq_len, context)
    prefix = prefix_ids(tokenizer)
    joined, wanted = text.joined, None if limit is None else limit * seq_len
    characters = len(joined) if wanted is None else wanted * (CHARACTERS_PER_TOKEN + 1)
    while True:  # tokenizes no more of a long text than the windows need
        cut = _cut(joined, characters)
        ids = next(encode(tokenizer, [joined[:cut]]))
        if wanted is None or cut == len(joined) or len(ids) >= wanted + TAIL_TOKENS:
            break
        characters *= 2
    packed = _pack([ids], prefix, limit, seq_len)
    tokens_NT = _tensor(packed, seq_len, text)
    if limit is not None and len(packed.rows) < limit:
        notes.append(
            f"evaluation on {len(packed.rows)} windows of {seq_len} tokens, not {limit}: "
            f"{text.name} has {len(ids)} tokens."
        )
    return Windows(tokens_NT, text.name, text.sha256, bool(prefix), None, (*text.notes, *notes))


def window_length(count: int, seq_len: int, context: int | None) -> tuple[int, list[str]]:
    """Tokens of a window within the model's context, and what is to be said of it.

    Args:
        count: Windows wanted.
        seq_len: Tokens of each, as asked.
        context: The model's longest position; None: any.

    Raises:
        ConfigError: If `count` or `seq_len` is too small.
    """
    if count < 1:
        raise ConfigError(f"{count} windows.", where="--samples", remedy="Ask for at least 1.")
    if seq_len < 2:
        raise ConfigError(
            f"windows of {seq_len} tokens.", where="--seq-len", remedy="Ask for at least 2."
        )
    if context is not None and seq_len > context:
        return context, [
            f"windows of {context} tokens, not {seq_len}: the model's context is {context}."
        ]
    return seq_len, []


def _cut(text: str, characters: int) -> int:
    """A place to cut at or after `characters`: past a line end, else at the text's end."""
    if characters >= len(text):
        return len(text)
    end = text.find("\n", characters)
    return len(text) if end < 0 else end + 1


def _pieces(text: TextSet, characters: int) -> list[str]:
    """The text in pieces of at least `characters`, the last excepted, cut at line ends.

    A line longer than two pieces (prose without line ends) is cut at spaces.
    """
    joined, pieces, start = text.joined, [], 0
    while start < len(joined):
        end = joined.find("\n", start + characters) + 1
        if not 0 < end <= start + 2 * characters:
            space = joined.find(" ", start + characters)
            end = space if 0 <= space < start + 2 * characters else start + 2 * characters
        pieces.append(joined[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


@dataclass
class _Packed:
    """Windows from a stream of texts.

    Attributes:
        rows: Their ids.
        seen: Ids of all texts that were looked at.
        joined: Windows that hold the end of one text and the start of the next.
    """

    rows: list[list[int]]
    seen: int = 0
    joined: int = 0


def _pack(
    texts: Iterable[list[int]], prefix: list[int], limit: int | None, seq_len: int
) -> _Packed:
    packed = _Packed([])
    rest: list[int] = []
    starts: list[int] = []  # of texts, within the rest
    for ids in texts:
        packed.seen += len(ids)
        starts.append(len(rest))
        rest, position = rest + ids, 0
        while limit is None or len(packed.rows) < limit:
            # a rendered conversation may bring its own BOS
            head = [] if rest[position : position + len(prefix)] == prefix else prefix
            body = rest[position : position + seq_len - len(head)]
            if len(head) + len(body) < seq_len:
                break
            packed.rows.append(head + body)
            packed.joined += any(position < start < position + len(body) for start in starts)
            position += len(body)
        if limit is not None and len(packed.rows) == limit:
            break
        rest = rest[position:]
        starts = [start - position for start in starts if start > position]
    return packed


def _tensor(packed: _Packed, seq_len: int, text: TextSet) -> Tensor:
    if not packed.rows:
        raise CalibrationError(
            f"the text has {packed.seen} tokens; one window needs {seq_len}.",
            where=text.name,
            remedy="Give a longer text or a smaller --seq-len.",
        )
    return torch.tensor(packed.rows, dtype=torch.int64)
