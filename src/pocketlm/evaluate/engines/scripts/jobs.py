"""What the Python scripts of this folder share: jobs from a file, a forked process for each.

They run in an engine's own environment and import nothing of pocketlm. A job is
``{"model", "sequences", "prompts", "new_tokens", "dtypes", "out"}``: token ids of equal length, and
prompts that are continued greedily. Its answer is ``out.json`` and, beside it, ``out.f32``: the
log-probabilities [N, T - 1, V] of what follows each token but the last, as raw float32. A forked
process has the engine's imports already, and an engine that crashes takes no other job with it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
NOT_INSTALLED = 3  # the exit code where the engine is not there


def run(answer: Callable[[Job, str], tuple[dict[str, Any], bytes]], *needed: str) -> None:
    """What a script does: ``python SCRIPT JOBS``; ends with `NOT_INSTALLED` where a module lacks.

    Args:
        answer: As `answer_all` takes it.
        needed: Modules, imported before any process is forked.
    """
    try:
        for name in needed:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    answer_all(sys.argv[1], answer)


def answer_all(jobs_file: str, answer: Callable[[Job, str], tuple[dict[str, Any], bytes]]) -> None:
    """Answers every job in each of its dtypes until one is answered.

    Args:
        jobs_file: JSON, a list of jobs.
        answer: Gives what the answer says, and the raw log-probabilities, of a job in a dtype.
    """
    for job in json.loads(Path(jobs_file).read_text("utf-8")):
        refusals: dict[str, str] = {}
        for dtype in job["dtypes"]:
            message = _apart(job, dtype, answer, refusals)
            if message is None:
                break
            refusals[dtype] = message
        else:
            _write(job, {"refused": refusals})


def _apart(job: Job, dtype: str, answer: Callable, refusals: dict[str, str]) -> str | None:
    """One job in one dtype, in a forked process where there is fork; what went wrong."""
    if not hasattr(os, "fork"):
        return _tried(job, dtype, answer, refusals)
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        message = _tried(job, dtype, answer, refusals)
        os.write(sending, (message or "").encode()[:4000])
        sys.stdout.flush()
        os._exit(0)  # without the engine's own farewells
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"its process was ended by signal {os.WTERMSIG(status)}."
    if os.WEXITSTATUS(status):
        return f"its process ended with exit code {os.WEXITSTATUS(status)}."
    return said or None


def _tried(job: Job, dtype: str, answer: Callable, refusals: dict[str, str]) -> str | None:
    try:
        said, raw = answer(job, dtype)
    except BaseException as error:  # whatever an engine raises is its answer
        traceback.print_exc()
        root = error
        while (inner := root.__cause__ or root.__context__) is not None:
            root = inner
        first = " ".join(str(error).split())
        cause = "" if root is error else f" ({type(root).__name__}: {' '.join(str(root).split())})"
        return f"{type(error).__name__}: {first}{cause}"[:1000]
    Path(job["out"] + ".f32").write_bytes(raw)
    _write(job, {**said, "dtype": dtype, "refused": refusals})
    return None


def _write(job: Job, said: dict[str, Any]) -> None:
    growing = Path(job["out"] + ".json.part")
    growing.write_text(json.dumps(said), encoding="utf-8")
    growing.rename(job["out"] + ".json")
