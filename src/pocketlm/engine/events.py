"""What a run tells: typed events. The CLI draws them, the log keeps them, nothing else prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["prepare", "calibrate", "compress", "assemble", "verify", "evaluate"]


class Event(BaseModel):
    """One line of the event log.

    Attributes:
        kind: What happened.
        text: A sentence for people.
        where: Module path, file or flag, if one is meant.
        block: Index of the block, if one is meant.
        done: Units of the stage that are finished.
        total: Units of the stage.
        seconds: How long the thing took.
        share: Of the run that is done, 0 to 1.
        seconds_left: Forecast for the run.
        data: Numbers behind it.
        time: Seconds since the epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal[
        "run_started", "resumed", "stage", "block_started", "block_done", "progress", "loss",
        "fallback", "warning", "run_done",
    ]  # fmt: skip
    text: str
    where: str | None = None
    block: int | None = None
    done: int | None = None
    total: int | None = None
    seconds: float | None = None
    share: float | None = None
    seconds_left: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    time: float = Field(default_factory=time.time)


Listener = Callable[[Event], None]


class EventLog:
    """Appends each event to a JSON-lines file and hands it to a listener.

    Args:
        path: The log; an earlier run's lines stay in it. None: no file.
        listener: Called with each event.
    """

    def __init__(self, path: Path | None, listener: Listener | None = None) -> None:
        self._path, self._listener = path, listener

    def emit(self, kind: str, text: str, *, keep: bool = True, **fields: Any) -> None:
        """Hands on an event and, where it is to be kept, writes it down; `fields` are Event's."""
        event = Event.model_validate({"kind": kind, "text": text, **fields})
        if keep and self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event.model_dump(exclude_none=True)) + "\n")
        if self._listener is not None:
            self._listener(event)
