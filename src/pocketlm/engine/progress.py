"""How far a run has come, and how long it has still to go: the plan at first, then its own pace.

For a stage of which a share is done after some seconds
    total = (PRIOR · planned + seconds) / (PRIOR + share):
the plan counts as if PRIOR of the stage had gone just as planned. Stages share the run by their
planned seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pocketlm.engine.events import EventLog

PRIOR = 0.1
SECONDS_BETWEEN = 0.25  # of steps that nobody needs to see each of


class Progress:
    """Tells a run's stages and steps as events.

    Args:
        log: Where events go.
        planned: Stage → predicted seconds, in order.
        clock: Gives seconds.
    """

    def __init__(
        self,
        log: EventLog,
        planned: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._clock = log, clock
        self._planned = dict(planned)
        self._stage, self._began, self._told = "", clock(), 0.0

    def stage(self, name: str, text: str, planned: float | None = None) -> None:
        """Begins a stage.

        Args:
            name: One of the planned ones.
            text: What is done in it.
            planned: Seconds, where the plan did not know what an earlier attempt has left to do.
        """
        if planned is not None:
            self._planned[name] = planned
        self._stage, self._began, self._told = name, self._clock(), 0.0
        self._emit("stage", text, 0.0, {"data": {"stage": name}})

    def step(self, share: float, text: str, kind: str = "progress", **fields: Any) -> None:
        """A step of the stage; smaller ones are told a few times a second, and not kept.

        Args:
            share: Of the stage that is done, 0 to 1.
            text: What has been done.
            kind: Of the event.
            **fields: Of the event.
        """
        now = self._clock()
        if kind == "progress" and share < 1 and now - self._told < SECONDS_BETWEEN:
            return
        self._told = now
        data = {"stage": self._stage, **fields.pop("data", {})}
        self._emit(kind, text, share, {**fields, "data": data})

    def _emit(self, kind: str, text: str, share: float, fields: Mapping[str, Any]) -> None:
        planned = list(self._planned.values())
        place = list(self._planned).index(self._stage)
        seconds = self._clock() - self._began
        total = (PRIOR * planned[place] + seconds) / (PRIOR + share)
        done = sum(planned[:place]) + share * planned[place]
        self._log.emit(
            kind,
            text,
            keep=kind != "progress",
            share=min(1.0, done / sum(planned)) if sum(planned) else share,
            seconds_left=max(0.0, total - seconds) + sum(planned[place + 1 :]),
            **fields,
        )
