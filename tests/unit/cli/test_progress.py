"""Events as plain lines, in a log file, and on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pocketlm.cli import progress as module
from pocketlm.cli.progress import Bar, Lines, Show, log_line, progress
from pocketlm.core.errors import ConfigError
from pocketlm.engine.events import Event


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal)


def block(done: int) -> Event:
    return Event(
        kind="block_done", text=f"block {done - 1}", done=done, total=3, seconds=2.0,
        seconds_left=125.0,
    )  # fmt: skip


def test_a_line_for_each_block_with_the_time_left():
    drawn = console(terminal=False)
    show = Show(Lines(drawn))
    show(Event(kind="stage", text="compressing 3 blocks"))
    show(block(1))
    lines = drawn.file.getvalue().splitlines()
    assert lines == ["compressing 3 blocks", "1/3  block 0  2 s  · 2 min 05 s left"]


def test_small_steps_are_drawn_seldom(monkeypatch):
    drawn, now = console(terminal=False), [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    show = Show(Lines(drawn))
    for done in range(1, 31):
        show(Event(kind="progress", text="windows", done=done, total=30))
        now[0] += 1.0
    assert len(drawn.file.getvalue().splitlines()) == 3


def test_a_warning_of_every_layer_is_drawn_once_and_counted():
    drawn = console(terminal=False)
    show = Show(Lines(drawn))
    for layer in range(7):
        show(Event(kind="warning", text="group 64", where=f"layer {layer}"))
    show(Event(kind="fallback", text="more damping", where="layer 3"))
    show.finish()
    assert drawn.file.getvalue().splitlines() == [
        "layer 0: group 64",
        "layer 3: more damping",
        "… and 6 more like these; the ledger has all.",
    ]


def test_the_bar_shows_count_and_time_left():
    drawn = console(terminal=True)
    with Bar(drawn) as bar:
        show = Show(bar)
        show(Event(kind="stage", text="compress"))
        show(block(2))
        bar._bar.refresh()
    shown = drawn.file.getvalue()
    assert "2/3" in shown
    assert "2 min 05 s left" in shown


def test_the_log_file_has_every_event_even_when_quiet(tmp_path, capsys):
    path = tmp_path / "run.log"
    with progress(quiet=True, log_file=path) as listen:
        for layer in range(7):
            listen(Event(kind="fallback", text="group 64", where=f"layer {layer}"))
        listen(block(3))
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 8
    assert lines[-1].endswith("block_done 3/3 block 2")
    assert capsys.readouterr().err == ""


def test_an_unwritable_log_file_is_an_error_of_its_flag(tmp_path):
    with pytest.raises(ConfigError, match="--log-file"), progress(quiet=True, log_file=tmp_path):
        pass


def test_a_log_line_names_time_kind_and_place():
    event = Event(kind="warning", text="Little text.", where="calibration", time=0.0)
    assert log_line(event).endswith("warning [calibration] Little text.")
