"""A row's tokens become its answer: text, stop strings, ends.

What could be the beginning of a stop string is held back until it is known not to be one.
"""

from __future__ import annotations

from collections.abc import Callable

from pocketlm.runtime.stream_text import TextStream


class Answer:
    """The text of a row so far.

    Args:
        stream: Makes text of its tokens.
        ends: Ids that end it, without appearing in it.
        stop: Strings that end it and are cut off.
        on_text: Called with each piece as it becomes final.

    Attributes:
        text: So far, what is held back included.
        shown: Characters of it that are final.
        tokens: All of them, one that ended it included.
        stopped_by: ``end``, ``stop`` or, so far, ``length``.
    """

    def __init__(
        self,
        stream: TextStream,
        ends: frozenset[int],
        stop: tuple[str, ...],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self._stream, self._ends, self._stop, self._on_text = stream, ends, stop, on_text
        self.text, self.shown = "", 0
        self.tokens: list[int] = []
        self.stopped_by = "length"

    def push(self, token: int) -> None:
        """Takes a token; `stopped_by` tells whether it was the last."""
        self.tokens.append(token)
        if token in self._ends:
            self.stopped_by = "end"
            return
        self.text += self._stream.push(token)
        self._cut()
        self._show(hold=self.stopped_by == "length")

    def finish(self) -> None:
        """Shows what was held back."""
        if self.stopped_by != "stop":
            self.text += self._stream.flush()
            self._cut()
        self._show(hold=False)

    def _cut(self) -> None:
        places = [at for at in map(self.text.find, self._stop) if at >= 0]
        if places:
            self.text, self.stopped_by = self.text[: min(places)], "stop"

    def _show(self, *, hold: bool) -> None:
        final = len(self.text)
        if hold:
            final -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        if final > self.shown:
            if self._on_text is not None:
                self._on_text(self.text[self.shown : final])
            self.shown = final


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
