"""The tokenizer as calibration sees it: plain text to ids, and what it puts before a text.

The protocol lists what is called, so that this package needs no transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

BATCH_TEXTS = 32  # texts handed over at once: enough for its threads, few enough to stop early


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def chat_template(self) -> Any:
        """The chat template; None where the tokenizer has none."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that stand for no text."""
        ...

    def __call__(self, text: Any, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Token ids under the key ``input_ids``."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any:
        """A conversation as the text that the model was trained on."""
        ...


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, nothing added before or after it.

    Args:
        tokenizer: The model's.
        texts: Taken a batch at a time; a caller that has enough may stop.

    Yields:
        The ids of one text.
    """
    for start in range(0, len(texts), BATCH_TEXTS):
        batch = list(texts[start : start + BATCH_TEXTS])
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing.

    Args:
        tokenizer: The model's.

    Returns:
        The ids, usually none or one.
    """
    probe = "a"
    full = tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"]
    bare = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []
