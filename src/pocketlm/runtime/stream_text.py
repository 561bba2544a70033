"""Token ids → text pieces that can be printed at once: no half of a character, nothing taken back.

Each piece is the difference between two decodings of one window of ids. A piece is held back while
the decoding ends in U+FFFD, the mark of an unfinished multi-byte character; a window starts anew at
each line end, so the work does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 12  # tokens: 4 bytes each of a few joined characters; more is broken text


class TextStream:
    """Takes tokens one by one and gives the text that has become final.

    Args:
        tokenizer: Decodes ids.
        context: Ids before the first new one; some tokenizers need them to place a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-4:]
        self._printed = self._decode()
        self._pending = 0

    def push(self, token: int) -> str:
        """The text that this token finishes, perhaps empty."""
        self._ids.append(token)
        self._pending += 1
        text = self._decode()
        if text.endswith(UNFINISHED) and self._pending < LONGEST_CHARACTER:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        return self._emit(self._decode())

    def _emit(self, text: str) -> str:
        piece = text[len(self._printed) :]
        self._printed, self._pending = text, 0
        if piece.endswith("\n"):
            self._ids = self._ids[-1:]
            self._printed = self._decode()
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
