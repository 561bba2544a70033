"""Draws a run's events on stderr: a bar on a terminal, plain lines in a log; and a log file.

The same warning may befall every layer: it is shown once, the rest are counted. All of them are in
the log file, the ledger and the report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pocketlm.cli import output
from pocketlm.core.errors import ConfigError
from pocketlm.report.words import seconds_text

if TYPE_CHECKING:
    from pocketlm.engine.events import Event, Listener

DIFFERENT_SHOWN = 12
SECONDS_BETWEEN_LINES = 10.0  # of steps smaller than a block, where there is no terminal


class Drawer(Protocol):
    """A way to draw events."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def say(self, text: str, style: str) -> None:
        """A sentence that stays."""
        ...

    def advance(self, event: Event) -> None:
        """A step of the current stage."""
        ...


@contextlib.contextmanager
def progress(*, quiet: bool, log_file: Path | None) -> Iterator[Listener]:
    """Draws events while the context is open.

    Args:
        quiet: Draw nothing.
        log_file: Each event is appended here as a line of text.

    Yields:
        What to hand to the API as ``on_event``.

    Raises:
        ConfigError: If the log file cannot be written.
    """
    console = output.stderr()
    with contextlib.ExitStack() as stack:
        log = None
        if log_file is not None:
            try:
                log = stack.enter_context(log_file.open("a", encoding="utf-8", buffering=1))
            except OSError as error:
                raise ConfigError(f"{error.strerror}.", where=f"--log-file {log_file}") from error
        drawer = stack.enter_context(Bar(console) if console.is_terminal else Lines(console))
        show = Show(drawer)

        def listen(event: Event) -> None:
            if log is not None:
                log.write(log_line(event) + "\n")
            if not quiet:
                show(event)

        yield listen
        if not quiet:
            show.finish()


@contextlib.contextmanager
def steps(text: str, *, quiet: bool, log_file: Path | None) -> Iterator[Callable[[int, int], None]]:
    """Draws plain counts of steps, where an API call has no events.

    Args:
        text: What is being done.
        quiet: Draw nothing.
        log_file: Each step is appended here as a line of text.

    Yields:
        What to hand to the API as ``on_progress``.
    """
    from pocketlm.engine.events import Event

    began: list[tuple[float, int]] = []  # when the first step was done: loading is no step

    def on_progress(done: int, total: int) -> None:
        began.append((time.monotonic(), done))
        (first, before), (now, _) = began[0], began[-1]
        left = None if done == before else (now - first) / (done - before) * (total - done)
        listen(Event(kind="progress", text=text, done=done, total=total, seconds_left=left))

    with progress(quiet=quiet, log_file=log_file) as listen:
        yield on_progress


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
        self._drawer, self._more = drawer, 0
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        place = "" if event.where is None else f"{event.where}: "
        if event.kind in ("progress", "block_done"):
            self._drawer.advance(event)
        elif event.kind in ("fallback", "warning"):
            if event.text in self._said or len(self._said) >= DIFFERENT_SHOWN:
                self._more += 1
            else:
                self._said.add(event.text)
                self._drawer.say(place + event.text, "yellow")
        elif event.kind != "block_started":
            self._drawer.say(event.text, "bold" if event.kind == "stage" else "")

    def finish(self) -> None:
        """Counts the warnings that were not drawn."""
        if self._more:
            self._drawer.say(f"… and {self._more} more like these; the ledger has all.", "yellow")


class Lines:
    """Plain lines: one a block, and one every few seconds for smaller steps.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def say(self, text: str, style: str) -> None:
        """Prints a sentence."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, event: Event) -> None:
        """Prints a finished block, or a smaller step if the last line is some seconds old."""
        now = time.monotonic()
        if event.kind == "progress" and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        count = "" if event.done is None else f"{event.done}/{event.total}  "
        took = "" if event.seconds is None else f"  {seconds_text(event.seconds)}"
        line = f"{count}{event.text}{took}{_left(event)}"
        self._console.print(line, markup=False, soft_wrap=True)


class Bar:
    """A bar with the time left, on a terminal.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str, style: str) -> None:
        """Prints a sentence above the bar; a new stage takes the old bar away."""
        if style == "bold" and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._bar.console.print(escape(text), style=style)

    def advance(self, event: Event) -> None:
        """Moves the bar."""
        if event.done is None or event.total is None:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=event.total, left="")
        self._bar.update(
            self._task,
            description=escape(event.text),
            completed=event.done,
            total=event.total,
            left=_left(event).strip(" ·"),
        )


def _left(event: Event) -> str:
    return "" if event.seconds_left is None else f"  · {seconds_text(event.seconds_left)} left"
