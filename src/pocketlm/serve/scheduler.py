"""The thread that runs the model: requests wait in a queue, join the batch, get their text.

Between two steps: rows that were cancelled or whose time is up leave, waiting ones join as long as
there is room, then all rows advance by a token. Everything that a request hears, it hears from here
in order: pieces of text, then an end or an error.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketlm.core.errors import NumericError, PocketLMError, ResourceError
from pocketlm.runtime.answer import Answer
from pocketlm.runtime.batch import Batch
from pocketlm.runtime.generate import end_tokens
from pocketlm.runtime.sampling import Sampling
from pocketlm.runtime.stream_text import TextStream
from pocketlm.serve.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("pocketlm.serve")


class Busy(PocketLMError):
    """The queue is full, or the server is going down."""


class TimeUp(PocketLMError):
    """A request waited for its whole time without a turn."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        prompt: Ids, at least one.
        max_tokens: The most to write.
        sampling: How tokens are chosen.
        seed: For drawing.
        stop: Strings that end it.
        likeliest: So many other tokens are told with each, and log-probabilities; None: nothing.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    likeliest: int | None = None


@dataclass(frozen=True)
class Chance:
    """A token that was chosen, and the model's log-probabilities there (temperature 1).

    Attributes:
        token: Its id.
        logprob: Natural logarithm.
        likeliest: Ids and log-probabilities, the likeliest first.
        offset: Characters of the answer before it.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """Text that has become final, with the tokens that begin in it where they were asked for."""

    text: str
    chances: tuple[Chance, ...] = ()


@dataclass(frozen=True)
class End:
    """The last that a request hears, if all went well.

    Attributes:
        stopped_by: ``end``, ``stop``, ``length`` or ``time``.
        tokens: New ones, one that ended it included.
    """

    stopped_by: str
    tokens: int


Event = Piece | End | PocketLMError


class Ticket:
    """A request under way."""

    def __init__(self, ask: Ask, tell: Callable[[Event], None], until: float) -> None:
        self.ask, self.tell, self.until = ask, tell, until
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody listens any more; its row is free before the next step."""
        self.cancelled = True


class Scheduler:
    """Runs one model for many.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer, used by no other thread.
        limits: Of the server.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> None:
        self._model, self._tokenizer, self.limits = model, tokenizer, limits
        self._ends = end_tokens(model, tokenizer)
        self._batch = Batch(model, limits.concurrency)
        self._waiting: deque[Ticket] = deque()
        self._rows: list[_Row] = []
        self._changed = threading.Condition()
        self._closing: float | None = None  # when those that are left are cut off
        self._thread = threading.Thread(target=self._run, name="pocketlm-model", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._closing is None

    def submit(self, ask: Ask, tell: Callable[[Event], None]) -> Ticket:
        """Puts a request into the queue.

        Args:
            ask: What is wanted.
            tell: Called from the model's thread with each event; must not block.

        Raises:
            Busy: If the queue is full or the server is going down.
        """
        ticket = Ticket(ask, tell, time.monotonic() + self.limits.seconds)
        with self._changed:
            if self._closing is not None:
                raise Busy("the server is shutting down.")
            if len(self._waiting) >= self.limits.queue:
                raise Busy(
                    f"{len(self._waiting)} requests are waiting already.", remedy="Try again later."
                )
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def close(self, seconds: float) -> None:
        """Takes nothing new, lets what runs go on for so long, and ends the thread."""
        with self._changed:
            self._closing = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._has_work():
            try:
                self._drop()
                self._admit()
                if self._rows:
                    self._step()
            except Exception as error:  # out of memory, a kernel: these answers are lost
                log.exception("a step failed")
                self._lose(ResourceError(f"the model's step failed: {_first_line(error)}"))
                self._batch = Batch(self._model, self.limits.concurrency)

    def _has_work(self) -> bool:
        """Waits for some; False where the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._rows or self._closing is not None)
            if self._closing is None:
                return True
            while self._waiting:
                self._waiting.popleft().tell(Busy("the server is shutting down."))
            if self._rows and time.monotonic() > self._closing:
                self._lose(Busy("the server is shutting down."))
            return bool(self._rows)

    def _lose(self, error: PocketLMError) -> None:
        for row in self._rows:
            row.ticket.tell(error)
        self._rows.clear()

    def _drop(self) -> None:
        """Rows that nobody listens to, or that have had their time, leave."""
        now = time.monotonic()
        for index in reversed(range(len(self._rows))):
            row = self._rows[index]
            if row.ticket.cancelled:
                self._leave(index)
            elif now > row.ticket.until:
                row.end("time")
                self._leave(index)

    def _admit(self) -> None:
        """Those who wait join, in the order in which they came."""
        while len(self._rows) < self._batch.most:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            if ticket.cancelled:
                continue
            if time.monotonic() > ticket.until:
                ticket.tell(TimeUp(f"no turn within {self.limits.seconds:g} seconds."))
                continue
            try:
                logits_V = self._batch.join(ticket.ask.prompt)
            except Exception as error:
                ticket.tell(
                    ResourceError(f"its prompt could not be computed: {_first_line(error)}")
                )
                raise
            self._rows.append(_Row(ticket, self._tokenizer, self._ends, logits_V.device))
            self._choose(logits_V[None], [len(self._rows) - 1])

    def _step(self) -> None:
        logits_BV = self._batch.advance([row.newest for row in self._rows])
        self._choose(logits_BV, list(range(len(self._rows))))

    @torch.inference_mode()
    def _choose(self, logits_BV: Tensor, indices: list[int]) -> None:
        """A token for each of some rows; those that end leave."""
        top_B, greedy_B = logits_BV.max(-1)
        chosen = list(zip(indices, logits_BV, top_B.tolist(), greedy_B.tolist(), strict=True))
        for index, logits_V, top, greedy in reversed(chosen):
            row = self._rows[index]
            if not abs(top) < float("inf"):
                row.ticket.tell(NumericError("the model's logits are not finite."))
                self._leave(index)
            elif not row.push(logits_V, greedy):
                self._leave(index)

    def _leave(self, index: int) -> None:
        self._batch.leave(index)
        last = self._rows.pop()
        if index < len(self._rows):
            self._rows[index] = last


class _Row:
    """An answer being written."""

    def __init__(
        self,
        ticket: Ticket,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        device: torch.device,
    ) -> None:
        self.ticket, self.ask = ticket, ticket.ask
        stream = TextStream(tokenizer, self.ask.prompt)
        self._text = ""  # final, not told yet
        self._answer = Answer(stream, ends, self.ask.stop, self._add)
        self._chances: list[Chance] = []
        self._generator = torch.Generator(device).manual_seed(self.ask.seed)

    @property
    def newest(self) -> int:
        """The last token, whose keys and values the batch does not have yet."""
        return self._answer.tokens[-1]

    def push(self, logits_V: Tensor, greedy: int) -> bool:
        """Chooses the next token and tells what it makes final; False where it was the last."""
        token = greedy
        if self.ask.sampling.temperature > 0:
            token = int(self.ask.sampling.draw(logits_V[None], self._generator))
        answer = self._answer
        if self.ask.likeliest is not None:
            self._chances.append(_chance(logits_V, token, self.ask.likeliest, len(answer.text)))
        answer.push(token)
        if answer.stopped_by == "end" and self._chances:
            self._chances.pop()  # it is not in the text
        if answer.stopped_by == "length" and len(answer.tokens) < self.ask.max_tokens:
            self._tell()
            return True
        self.end(answer.stopped_by)
        return False

    def end(self, stopped_by: str) -> None:
        """Tells what was held back, and the end."""
        self._answer.finish()
        if stopped_by == "length":  # a stop string may have come with the last characters
            stopped_by = self._answer.stopped_by
        self._tell(last=True)
        self.ticket.tell(End(stopped_by, len(self._answer.tokens)))

    def _add(self, text: str) -> None:
        self._text += text

    def _tell(self, last: bool = False) -> None:
        """One event with the text that is final and the tokens that begin in it."""
        shown = self._answer.shown
        stopped = self._answer.stopped_by == "stop"
        everything = last and not stopped
        ready = [c for c in self._chances if everything or c.offset < shown]
        if self._text or ready:
            self.ticket.tell(Piece(self._text, tuple(ready)))
            self._text, self._chances = "", self._chances[len(ready) :]


def _chance(logits_V: Tensor, token: int, likeliest: int, offset: int) -> Chance:
    logprob_V = logits_V.float().log_softmax(-1)
    values, ids = logprob_V.topk(likeliest)
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Chance(token, float(logprob_V[token]), pairs, offset)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
