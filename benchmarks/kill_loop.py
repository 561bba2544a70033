"""Killed at any instant, does the same command redo at most one block and give the same bytes?

First one run to its end: its files are the truth, and its trace lists every call by which a run
changes the disk (open to write, fsync, replace, rename, unlink, rmdir). Then runs that are ended
with SIGKILL, each resumed by the same call:
- timed: at a random moment after the first event;
- aimed: before and after each such call that comes after the last block (shard assembly, index,
  config.json, the final rename, report), at random earlier ones, and at some of the many that
  remove the work directory.
Each round ends with a finish, whose files are compared; blocks started in a round, as the event log
tells, are at most blocks + kills. Attempts are forked from this process, which has only imported.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import SCRATCH, differences, digests, environment, publish, table
from synthetic import write_tiny

DURABLE = ("fsync", "replace", "rename", "link", "unlink", "rmdir")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="any source; default: a tiny random model written here")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--timed", type=int, default=15, help="kills at random moments")
    parser.add_argument("--earlier", type=int, default=5, help="aimed kills before the last block")
    parser.add_argument("--removals", type=int, default=4, help="aimed kills at unlink and rmdir")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


@dataclass(frozen=True)
class Kill:
    """When an attempt dies.

    Attributes:
        seconds: After the first event, from outside; None for an aimed kill.
        call: Name of the durable call.
        file: Name of the file or directory that it is about.
        before: Whether the call is not made any more.
    """

    seconds: float | None = None
    call: str = ""
    file: str = ""
    before: bool = True

    def __str__(self) -> str:
        """For the table."""
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        return f"{'before' if self.before else 'after'} {self.call} {self.file}"


@dataclass
class Round:
    """One output from nothing to whole.

    Attributes:
        kills: Those that struck.
        missed: Planned kills that came too late: the attempt had finished.
        started: Blocks started, over all attempts.
        finished: Blocks done.
        differing: Files that are not the same bytes.
        left_over: Paths beside the output that should be gone.
    """

    kills: list[Kill] = field(default_factory=list)
    missed: list[Kill] = field(default_factory=list)
    started: int = 0
    finished: int = 0
    differing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


class Attempt:
    """One compress in a forked child.

    Args:
        arguments: The command line.
        model: The source.
        output: Where the artifact goes.
        events: The event log, appended to.
        kill: An aimed kill; None for none or a timed one.
        trace: File for the durable calls, if wanted.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: str,
        output: Path,
        events: Path,
        kill: Kill | None = None,
        trace: Path | None = None,
    ) -> None:
        self.events, self._before = events, len(read_events(events))
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._run(arguments, model, output, kill, trace)
                code = 0
            except BaseException:  # a forked child must never return into the parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def _run(
        self,
        arguments: argparse.Namespace,
        model: str,
        output: Path,
        kill: Kill | None,
        trace: Path | None,
    ) -> None:
        from pocketlm import api

        log = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def listen(event: Any) -> None:
            os.write(log, event.model_dump_json(exclude_none=True).encode() + b"\n")

        if kill is not None or trace is not None:
            watch_durable_calls(kill, trace)
        recipe = api.build_recipe(
            method=arguments.method, bits=4, group_size=arguments.group_size, symmetric=True
        )
        api.compress(
            model,
            recipe,
            output,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            threads=arguments.threads,
            device="cpu",
            seed=0,
            on_event=listen,
        )

    def wait(self, seconds: float | None = None) -> int:
        """Waits for the end; SIGKILL `seconds` after the first event of this attempt.

        Returns:
            The exit code, or minus the signal.
        """
        deadline = None
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if seconds is not None and deadline is None:
                if len(read_events(self.events)) > self._before:
                    deadline = time.perf_counter() + seconds
            elif deadline is not None and time.perf_counter() >= deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.0005)


def watch_durable_calls(kill: Kill | None, trace: Path | None) -> None:
    """Wraps the calls that change the disk: writes them down, or dies at one.

    Args:
        kill: Where to die.
        trace: File that gets a line for each call.
    """
    lines = None if trace is None else trace.open("w", buffering=1)

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*positional: Any, **named: Any) -> Any:
            file = subject(name, positional)
            here = kill is not None and (name, file) == (kill.call, kill.file)
            if lines is not None:
                lines.write(json.dumps({"time": time.time(), "call": name, "file": file}) + "\n")
            if here and kill is not None and kill.before:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(*positional, **named)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return wrapped

    real_open, wrapped_open = io.open, wrap("open", io.open)

    def opened(file: Any, mode: str = "r", *positional: Any, **named: Any) -> Any:
        ours = isinstance(file, str | os.PathLike) and str(file).startswith(str(SCRATCH))
        writing = ours and any(letter in mode for letter in "wax+")
        return (wrapped_open if writing else real_open)(file, mode, *positional, **named)

    io.open = builtins.open = opened
    for name in DURABLE:
        setattr(os, name, wrap(name, getattr(os, name)))


def subject(call: str, positional: tuple[Any, ...]) -> str:
    """The name of what a call is about: the destination of two, the file of a descriptor.

    The random part of a temporary name becomes a star, so that attempts agree on it.
    """
    if call == "fsync":
        path = os.readlink(f"/proc/self/fd/{int(positional[0])}")
    else:
        path = os.fsdecode(positional[1 if call in ("replace", "rename", "link") else 0])
    return re.sub(r"^(\..+\.)[a-z0-9_]{8}$", r"\1*", Path(path).name)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The event log; a line that a kill tore is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def plan_kills(
    arguments: argparse.Namespace, trace: list[dict[str, Any]], events: list[dict[str, Any]]
) -> list[Kill]:
    """Timed kills, then aimed ones: all of the end, some of before."""
    dice = random.Random(arguments.seed)
    span = events[-1]["time"] - events[0]["time"]
    timed = [Kill(seconds=dice.uniform(0, span / 3)) for _ in range(arguments.timed)]
    last_block = max(event["time"] for event in events if event["kind"] == "block_done")

    def aims(calls: list[dict[str, Any]]) -> list[Kill]:
        unique = dict.fromkeys((call["call"], call["file"]) for call in calls)
        return [Kill(None, *place, before) for place in unique for before in (True, False)]

    early = aims([call for call in trace if call["time"] < last_block])
    late = aims([call for call in trace if call["time"] >= last_block])
    late = [kill for kill in late if kill not in early]
    removals = [kill for kill in late if kill.call in ("unlink", "rmdir")]
    late = [kill for kill in late if kill not in removals]
    for some, limit in ((early, arguments.earlier), (removals, arguments.removals)):
        late = dice.sample(some, min(limit, len(some))) + late
    return timed + late


def main() -> int:
    """Exit code 1 where bytes differ, a block was redone too often or something is left over."""
    arguments = parse()
    model = arguments.model or str(write_tiny(SCRATCH / "tiny"))
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for module in ("pocketlm.api", "pocketlm.models", "pocketlm.engine.compress"):
        importlib.import_module(module)  # once, for all attempts

    place = SCRATCH / "kill-loop"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    truth, trace = place / "truth" / "out", place / "trace.jsonl"
    truth.parent.mkdir()
    code = Attempt(arguments, model, truth, place / "truth.jsonl", trace=trace).wait()
    if code != 0:
        raise SystemExit(f"the uninterrupted run ended with {code}")
    whole = digests(truth)
    events = read_events(place / "truth.jsonl")
    blocks = sum(event["kind"] == "block_done" for event in events)
    queue = plan_kills(arguments, read_events(trace), events)
    planned, rounds = len(queue), []
    while queue:
        rounds.append(one_round(arguments, model, place / f"round-{len(rounds)}", queue, whole))
        now = rounds[-1]
        wrong = ", ".join([*now.differing, *now.left_over]) or "nothing wrong"
        print(f"{len(now.kills)} kills, {wrong}; {len(queue)} to come", file=sys.stderr)
    return show(arguments, model, blocks, planned, rounds)


def one_round(
    arguments: argparse.Namespace, model: str, place: Path, queue: list[Kill], whole: dict[str, str]
) -> Round:
    """Kills and resumes until an attempt comes through."""
    place.mkdir()
    output, events, now = place / "out", place / "events.jsonl", Round()
    while True:
        placed = (output / "config.json").exists()  # whole: nothing is left to be killed
        kill = queue.pop(0) if queue and not placed else None
        aimed = kill if kill is not None and kill.seconds is None else None
        attempt = Attempt(arguments, model, output, events, aimed)
        code = attempt.wait(None if kill is None else kill.seconds)
        if code == -signal.SIGKILL and kill is not None:
            now.kills.append(kill)
            continue
        if code != 0:
            raise SystemExit(f"an attempt to resume after {now.kills[-1:]} ended with {code}")
        if kill is not None:
            now.missed.append(kill)
        break
    kinds = [event["kind"] for event in read_events(events)]
    now.started, now.finished = kinds.count("block_started"), kinds.count("block_done")
    now.differing, _ = differences(whole, digests(output))
    now.left_over = sorted(
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path not in (output, events) and output not in path.parents
    )
    shutil.rmtree(output)
    return now


def show(
    arguments: argparse.Namespace, model: str, blocks: int, planned: int, rounds: list[Round]
) -> int:
    """Prints the rounds and the verdict."""
    rows, kills = [], sum(len(now.kills) for now in rounds)
    good = kills >= 20
    for number, now in enumerate(rounds, start=1):
        within = now.started <= blocks + len(now.kills)
        good = good and within and not now.differing and not now.left_over
        rows.append(
            (number, len(now.kills), f"{now.started} <= {blocks} + {len(now.kills)}: {within}",
             "same" if not now.differing else ", ".join(now.differing),
             ", ".join(now.left_over) or "nothing",
             "; ".join(str(kill) for kill in now.kills[-2:]))
        )  # fmt: skip
    header = ("round", "kills", "blocks started", "bytes", "left over", "its last kills")
    struck = sorted({f"{k.call} {k.file}" for now in rounds for k in now.kills if k.call})
    shown = (
        f"{table(header, rows)}\n\n{model}, {arguments.method}: {kills} kills of {planned} planned "
        f"in {len(rounds)} rounds, each round finished and compared. Calls killed at, before or "
        f"after: {', '.join(struck)}. {'Met' if good else 'MISSED'}."
    )
    result = {
        "environment": environment(arguments.threads),
        "model": model,
        "blocks": blocks,
        "kills": kills,
        "rounds": [
            {"kills": [str(kill) for kill in now.kills], "started": now.started,
             "finished": now.finished, "differing": now.differing, "left_over": now.left_over}
            for now in rounds
        ],
        "met": good,
    }  # fmt: skip
    publish("Interrupted by SIGKILL: same bytes", shown, result, arguments.record)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
