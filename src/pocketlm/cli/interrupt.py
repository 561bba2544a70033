"""Ctrl-C: the first one unwinds and leaves a state to resume from, the second one exits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as shells count


@contextlib.contextmanager
def twice_exits() -> Iterator[None]:
    """Within the context the first SIGINT raises KeyboardInterrupt, the second ends the process.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            os._exit(EXIT_CODE)
        pressed = True
        print("\nStopping; Ctrl-C again exits at once.", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
