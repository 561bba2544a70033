"""Draws events on stderr: one live line on a terminal, plain lines in a log; and in a log file.

The same warning may befall every layer: it is shown once, and at the end with how many more have
it, as the answer's summary counts. All of them are in the log file, the ledger and the report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.markup import escape

from pocketlm.cli import output
from pocketlm.cli.live_line import LiveLine
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import seconds_text

if TYPE_CHECKING:
    from pocketlm.engine.events import Event, Listener

DIFFERENT_SHOWN = 12
SECONDS_BETWEEN_LINES = 10.0  # of steps smaller than a block, in a log


class Drawer(Protocol):
    """A way to draw events."""

    def start(self) -> None:
        """Begins to draw."""
        ...

    def stop(self) -> None:
        """Ends drawing."""
        ...

    def say(self, text: str, style: str) -> None:
        """A sentence that stays."""
        ...

    def stage(self, event: Event) -> None:
        """What is being done from now on."""
        ...

    def step(self, event: Event) -> None:
        """A step of the current stage."""
        ...


@contextlib.contextmanager
def progress(*, quiet: bool, log_file: Path | None) -> Iterator[Listener]:
    """Draws events while the context is open.

    Args:
        quiet: Draw nothing.
        log_file: Events are appended here as lines of text; of small steps one every few seconds.

    Yields:
        What to hand to the API as ``on_event``.

    Raises:
        ConfigError: If the log file cannot be written.
    """
    console = output.stderr()
    live = console.is_terminal and not console.is_dumb_terminal
    with contextlib.ExitStack() as stack:
        log = None
        if log_file is not None:
            try:
                log = stack.enter_context(log_file.open("a", encoding="utf-8", buffering=1))
            except OSError as error:
                raise ConfigError(f"{error.strerror}.", where=f"--log-file {log_file}") from error
        show = None
        if not quiet:
            drawer = LiveLine(console) if live else Lines(console)
            drawer.start()
            stack.callback(drawer.stop)
            show = Show(drawer)
        now_and_then = Seldom()

        def listen(event: Event) -> None:
            if log is not None and not now_and_then.skips(event):
                log.write(log_line(event) + "\n")
            if show is not None:
                show(event)

        yield listen
        if show is not None:
            show.finish()


class Seldom:
    """Lets one small step through every few seconds, and everything else."""

    def __init__(self) -> None:
        self._last = -SECONDS_BETWEEN_LINES

    def skips(self, event: Event) -> bool:
        """Whether an event is one small step too many."""
        now = time.monotonic()
        if event.kind == "progress" and now - self._last < SECONDS_BETWEEN_LINES:
            return True
        self._last = now
        return False


def log_line(event: Event) -> str:
    """An event as one line: time, kind, place, text."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    place = "" if event.where is None else f" [{event.where}]"
    count = "" if event.done is None or event.total is None else f" {event.done}/{event.total}"
    return f"{stamp} {event.kind}{count}{place} {event.text}"


class Show:
    """Decides what of the events is drawn.

    Args:
        drawer: What draws it.
    """

    def __init__(self, drawer: Drawer) -> None:
        self._drawer, self._not_shown = drawer, 0
        self._said: dict[str, list[str]] = {}  # warning → the place of each that had it

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        place = "" if event.where is None else f"{event.where}: "
        if event.kind in ("progress", "block_started", "block_done"):
            self._drawer.step(event)
        elif event.kind in ("fallback", "warning"):
            if event.text in self._said:
                self._said[event.text].append(event.where or "")
            elif len(self._said) < DIFFERENT_SHOWN:
                self._said[event.text] = [event.where or ""]
                self._drawer.say(place + event.text, "yellow")
            else:
                self._not_shown += 1
        elif event.kind == "resumed":
            self._drawer.say(event.text, "")
        elif event.kind in ("run_started", "stage", "run_done"):
            self._drawer.stage(event)

    def finish(self) -> None:
        """Counts the warnings that were not drawn."""
        for text, places in self._said.items():
            if len(places) > 1:
                first = places[0] or "once"
                self._drawer.say(f"{first} and {len(places) - 1} more: {text}", "yellow")
        if self._not_shown:
            self._drawer.say(f"… and {self._not_shown} others; the ledger has all.", "yellow")


class Lines:
    """Plain lines: one a stage and a block, and one every few seconds for smaller steps.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._seldom = console, Seldom()

    def start(self) -> None:
        """Prints the first line: heavy imports, which take their time, come after it."""
        self.say("starting", "")

    def stop(self) -> None:
        """Lines need no end."""

    def say(self, text: str, style: str) -> None:
        """Prints a sentence."""
        self._console.print(escape(text), soft_wrap=True)

    def stage(self, event: Event) -> None:
        """Prints what is being done."""
        self.say(event.text, "")

    def step(self, event: Event) -> None:
        """Prints a finished block, or a smaller step if the last line is some seconds old."""
        if event.kind == "block_started" or self._seldom.skips(event):
            return
        words = [event.text]
        if event.kind == "progress" and event.total is not None:
            words[0] += f" {event.done}/{event.total}"
        if event.share is not None:
            words.append(f"{event.share:.0%}")
        if event.seconds is not None:
            words.append(seconds_text(event.seconds))
        if event.seconds_left is not None:
            words.append(f"{seconds_text(event.seconds_left)} left")
        self.say(" · ".join(words), "")
