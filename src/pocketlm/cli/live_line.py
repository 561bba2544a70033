"""One line on a terminal that stays in its place: what is done, how much of it, how long still.

    compressing block 12 of 30 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  41 % 1:23 so far, 2:02 left

It is drawn a few times a second, so that the clocks go on between two events; sentences are printed
above it. It is gone at the end: the answer takes its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pocketlm.engine.events import Event

DRAWN_A_SECOND = 4
WIDE_ENOUGH = 60  # columns; a narrower terminal gets no bar


class LiveLine:
    """A Drawer (see cli/progress.py) for terminals.

    Args:
        console: Where to.
        clock: Gives seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._began = self._heard = clock()
        self._text = "starting"
        self._share: float | None = None
        self._left: float | None = None
        self._live = Live(
            console=console,
            get_renderable=self.line,
            refresh_per_second=DRAWN_A_SECOND,
            transient=True,
        )

    def start(self) -> None:
        """Begins to draw."""
        self._live.start()

    def stop(self) -> None:
        """Takes the line away."""
        self._live.stop()

    def say(self, text: str, style: str) -> None:
        """Prints a sentence above the line."""
        self._console.print(escape(text), style=style, soft_wrap=True)

    def stage(self, event: Event) -> None:
        """Changes what the line says is being done."""
        self._text = event.text
        self._take(event)

    def step(self, event: Event) -> None:
        """Moves the bar."""
        if event.kind == "block_started":
            self._text = event.text
            return  # nothing has moved
        if event.kind == "progress":
            count = "" if event.total is None else f" {event.done}/{event.total}"
            self._text = event.text + count
        self._take(event)

    def _take(self, event: Event) -> None:
        self._share, self._left, self._heard = event.share, event.seconds_left, self._clock()

    def line(self) -> Table:
        """The line as it is now; as wide as the terminal, and never wider."""
        now = self._clock()
        clocks = f"{clock_text(now - self._began)} so far"
        if self._left is not None:
            clocks += f", {clock_text(max(0.0, self._left - (now - self._heard)))} left"
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        cells: list[Text | ProgressBar] = [Text(self._text)]
        if self._share is not None and self._console.width >= WIDE_ENOUGH:
            grid.add_column(ratio=1)
            cells.append(ProgressBar(total=1.0, completed=self._share))
        if self._share is not None:
            grid.add_column(no_wrap=True, justify="right", min_width=5)
            cells.append(Text(f"{self._share:.0%}".replace("%", " %")))
        grid.add_column(no_wrap=True, justify="right")
        cells.append(Text(clocks, style="dim"))
        grid.add_row(*cells)
        return grid


def clock_text(seconds: float) -> str:
    """A duration as a clock shows it: ``0:41``, ``12:05``, ``3:00:09``."""
    whole = int(seconds)
    minutes, rest = whole // 60 % 60, whole % 60
    if whole < 3600:
        return f"{minutes}:{rest:02d}"
    return f"{whole // 3600}:{minutes:02d}:{rest:02d}"
