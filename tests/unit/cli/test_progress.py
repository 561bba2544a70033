"""Events as plain lines, in a log file, and as one live line on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pocketlm.cli import progress as module
from pocketlm.cli.live_line import LiveLine, clock_text
from pocketlm.cli.progress import Lines, Show, log_line, progress
from pocketlm.core.errors import ConfigError
from pocketlm.engine.events import Event


def console(*, terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal)


def block(done: int) -> Event:
    return Event(
        kind="block_done", text=f"block {done} of 3", done=done, total=3, seconds=2.0,
        share=done / 3, seconds_left=125.0,
    )  # fmt: skip


def test_a_line_for_each_block_with_the_time_left():
    drawn = console(terminal=False)
    show = Show(Lines(drawn))
    show(Event(kind="stage", text="compressing 3 blocks"))
    show(block(1))
    lines = drawn.file.getvalue().splitlines()
    assert lines == ["compressing 3 blocks", "block 1 of 3 · 33% · 2 s · 2 min 05 s left"]


def test_small_steps_are_drawn_seldom(monkeypatch):
    drawn, now = console(terminal=False), [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    show = Show(Lines(drawn))
    for done in range(1, 31):
        show(Event(kind="progress", text="windows", done=done, total=30))
        now[0] += 1.0
    assert drawn.file.getvalue().splitlines() == [f"windows {done}/30" for done in (1, 11, 21)]


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
        "layer 0 and 6 more: group 64",
    ]


def lines_of(width: int, *seconds_later: float) -> list[str]:
    """The live line after two of three blocks, drawn on a terminal after some times."""
    now = [50.0]
    live = LiveLine(console(terminal=True, width=width), clock=lambda: now[0])
    now[0] += 60
    show = Show(live)
    show(Event(kind="stage", text="compressing 3 blocks"))
    show(block(2))
    show(Event(kind="block_started", text="compressing block 3 of 3"))
    drawn = []
    for later in seconds_later:
        now[0] += later
        plain = console(terminal=False, width=width)
        plain.print(live.line())
        drawn.append(plain.file.getvalue())
    return drawn


def test_the_live_line_says_what_how_much_and_how_long():
    first, later, last = lines_of(100, 0, 5, 500)
    assert first.startswith("compressing block 3 of 3 ━")
    assert first.rstrip().endswith("67 % 1:00 so far, 2:05 left")
    assert later.rstrip().endswith("1:05 so far, 2:00 left")
    assert last.rstrip().endswith("0:00 left")


@pytest.mark.parametrize("width", [200, 80, 60, 59, 30, 12])
def test_the_live_line_is_one_line_on_any_terminal(width: int):
    [line] = lines_of(width, 0)
    assert line.count("\n") == 1
    assert len(line.rstrip("\n")) <= width
    assert ("━" in line) == (width >= 60)


def test_the_terminal_keeps_only_what_must_stay():
    drawn = console(terminal=True)
    live = LiveLine(drawn)
    live.start()
    show = Show(live)
    show(Event(kind="run_started", text="compressing m to out"))
    for done in (1, 2, 3):
        show(block(done))
    show(Event(kind="warning", text="a warning"))
    live.stop()
    kept = drawn.file.getvalue()
    assert "a warning\x1b[0m\n" in kept
    assert kept.count("\n") <= 4  # the sentence, and the line's own moves
    assert kept.endswith("\x1b[2K")  # the line is taken away


def test_clocks():
    assert [clock_text(s) for s in (0, 41.9, 725, 10809)] == ["0:00", "0:41", "12:05", "3:00:09"]


def test_the_log_file_has_every_event_even_when_quiet(tmp_path, capsys):
    path = tmp_path / "run.log"
    with progress(quiet=True, log_file=path) as listen:
        for layer in range(7):
            listen(Event(kind="fallback", text="group 64", where=f"layer {layer}"))
        listen(block(3))
        listen(Event(kind="progress", text="too small", done=1, total=99))
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 8
    assert lines[-1].endswith("block_done 3/3 block 3 of 3")
    assert capsys.readouterr().err == ""


def test_an_unwritable_log_file_is_an_error_of_its_flag(tmp_path):
    with pytest.raises(ConfigError, match="--log-file"), progress(quiet=True, log_file=tmp_path):
        pass


def test_a_log_line_names_time_kind_and_place():
    event = Event(kind="warning", text="Little text.", where="calibration", time=0.0)
    assert log_line(event).endswith("warning [calibration] Little text.")
