"""What the benchmark scripts share: where things ran, child processes, their memory, the record.

Scripts that measure a child's memory must stay small themselves, so this module imports no torch.
Peak memory is the kernel's own high-water mark (VmHWM), read for the child and all its
descendants every few milliseconds and summed over them; it cannot miss a peak, only what a process
does in its last milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data/text"  # WikiText-2 and others; not part of the repository
SCRATCH = Path(tempfile.gettempdir()) / "bench"
RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("pocketlm", "torch", "transformers", "numpy", "safetensors")
POLL_SECONDS = 0.01

# Idle OpenMP threads that spin steal the cores of a small machine, from both tools alike.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Finished:
    """A child process that has ended.

    Attributes:
        exit_code: Negative: the signal that ended it.
        seconds: Wall time, interpreter start and imports included.
        peak_bytes: VmHWM summed over the process tree.
        output: Its standard output.
        errors: Its standard error.
    """

    exit_code: int
    seconds: float
    peak_bytes: int
    output: str
    errors: str

    def last_json(self) -> dict[str, Any]:
        """The JSON object that the output ends with (one line, or indented)."""
        text = self.output.rstrip()
        lines = text.splitlines()
        for start in range(len(lines) - 1, -1, -1):
            if lines[start].startswith("{"):
                return json.loads("\n".join(lines[start:]))
        raise SystemExit(f"no JSON in the output:\n{text[-2000:]}\n{self.errors[-2000:]}")


def run_child(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> Finished:
    """Runs a command to its end, watching the memory of its process tree.

    Args:
        command: Program and arguments.
        environment: Variables set beside the present ones.

    Returns:
        How it ended; a failure is the caller's to judge.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=errors,
            env={**os.environ, **QUIET_THREADS, **(environment or {})},
        )
        peaks: dict[int, int] = {}
        while child.poll() is None:
            for pid in tree(child.pid):
                peaks[pid] = max(peaks.get(pid, 0), high_water_bytes(pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        return Finished(
            child.returncode, seconds, sum(peaks.values()), output.read(), errors.read()
        )


def must(finished: Finished, what: str) -> Finished:
    """The same, or the script's end with what the child said."""
    if finished.exit_code != 0:
        raise SystemExit(
            f"{what} ended with exit code {finished.exit_code}:\n"
            f"{finished.output[-1000:]}\n{finished.errors[-3000:]}"
        )
    return finished


def tree(root: int) -> list[int]:
    """A process and its living descendants."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                queue += map(int, children.split())
        except OSError:  # it has just ended
            continue
    return found


def high_water_bytes(pid: int) -> int:
    """VmHWM of a process; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def pocketlm(*arguments: str | Path) -> list[str]:
    """The command line of our tool, run by this interpreter."""
    return [sys.executable, "-m", "pocketlm.cli.main", *map(str, arguments)]


def environment(threads: int | None = None) -> dict[str, Any]:
    """Date, device, threads and versions."""
    return {
        "date": date.today().isoformat(),
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    found = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                found[str(file.relative_to(directory))] = hashlib.file_digest(
                    stream, "sha256"
                ).hexdigest()
    return found


TIMED = (
    "pocketlm/events.jsonl",
    "pocketlm/metrics.json",
    "pocketlm/report.json",
    "pocketlm/report.html",
    "README.md",
)
"""Files of an artifact that may hold times; all others must be the same bytes (design, part 3)."""


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Files whose bytes differ: those that must not, and those that may. None may be missing."""
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    may = [name for name in names if name in TIMED and name in one and name in other]
    return [name for name in names if name not in may], may


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its columns padded."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def publish(title: str, shown: str, result: Mapping[str, Any], record: bool) -> None:
    """Prints a result, and appends it to RESULTS.md where asked.

    Args:
        title: The question.
        shown: The table, and lines below it.
        result: Everything, as plain JSON; `environment` is among it.
        record: Whether to append.
    """
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    line = (
        f"{where['date']}; {where['device']}, {where['cores']} cores, {where['threads']} threads, "
        f"load {where['load_average']:.1f} at the end; Python {where['python']}, {versions}."
    )
    print(f"\n{title}\n{line}\n\n{shown}\n")
    print(json.dumps(result))
    if record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n## {where['date']}: {title}\n\n{line}\n\n{shown}\n")
