"""The time left: the plan's at first, then what the pace says; the share never goes back."""

from __future__ import annotations

import pytest

from pocketlm.engine.events import Event, EventLog
from pocketlm.engine.progress import SECONDS_BETWEEN, Progress

PLANNED = {"calibrate": 10.0, "compress": 100.0, "assemble": 10.0}


class Run:
    """A run whose clock the test moves."""

    def __init__(self, tmp_path) -> None:
        self.now, self.seen = 1000.0, list[Event]()
        self.path = tmp_path / "events.jsonl"
        log = EventLog(self.path, self.seen.append)
        self.progress = Progress(log, PLANNED, clock=lambda: self.now)

    @property
    def last(self) -> Event:
        return self.seen[-1]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_before_the_first_step_the_plan_holds(run):
    run.progress.stage("calibrate", "embedding")
    assert (run.last.share, run.last.seconds_left) == (0.0, pytest.approx(120))
    run.progress.stage("compress", "compressing")
    assert run.last.share == pytest.approx(10 / 120)
    assert run.last.seconds_left == pytest.approx(110)


@pytest.mark.parametrize("slower", [0.25, 1, 3])
def test_the_pace_takes_over(run, slower):
    run.progress.stage("compress", "compressing")
    shares = []
    for done in range(1, 11):
        run.now += 10 * slower
        run.progress.step(done / 10, "block", kind="block_done")
        shares.append(run.last.share)
        left = (10 - done) * 10 * slower
        assert run.last.seconds_left - 10 == pytest.approx(
            left, abs=1e-6 + 100 * abs(1 - slower) / done
        )
    assert shares == sorted(shares)
    assert run.last.seconds_left == pytest.approx(10, abs=0.1 * 100)


def test_what_an_earlier_attempt_left_to_do(run):
    run.progress.stage("compress", "compressing", planned=25.0)
    assert run.last.seconds_left == pytest.approx(35)


def test_small_steps_are_neither_all_told_nor_kept(run):
    run.progress.stage("compress", "compressing")
    for step in range(1, 101):
        run.now += SECONDS_BETWEEN / 8
        run.progress.step(step / 100, "inside")
    told = [event for event in run.seen if event.kind == "progress"]
    assert len(told) == 1 + 99 // 8 + 1
    assert told[-1].share == pytest.approx(110 / 120)
    assert "inside" not in run.path.read_text("utf-8")
