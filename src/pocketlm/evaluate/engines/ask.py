"""Asks an engine for log-probabilities and greedy continuations: many models, one process.

A job that ends the process is refused with what was said last, and the others are asked again.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.errors import ResourceError
from pocketlm.evaluate.engines.find import JOBS, Engine
from pocketlm.evaluate.engines.questions import Questions

NOT_INSTALLED = 3  # exit code of the scripts
MINUTES_AT_MOST = 30  # for each model
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """One model and what is asked of it.

    Attributes:
        model: A directory, or a GGUF file.
        questions: Token ids.
        dtypes: What the engine is to compute in, the first that it takes.
        text: Cut into tokens by the engine's own tokenizer (llama.cpp alone).
    """

    model: Path
    questions: Questions
    dtypes: tuple[str, ...]
    text: str | None = None


@dataclass(frozen=True)
class Answer:
    """What an engine said.

    Attributes:
        version: Of the engine, with its name.
        dtype: What it computed in.
        rows_NTV: What follows each token but the last: log-probabilities, or logits.
        generated: Greedy continuations of the prompts.
        refused: Dtype → why the engine did not run in it, of those before `dtype`.
        tokens: Of the job's text; None where it has none.
        chat_template: As the engine reads it from the file (llama.cpp alone).
    """

    version: str
    dtype: str
    rows_NTV: Tensor
    generated: tuple[tuple[int, ...], ...]
    refused: dict[str, str]
    tokens: tuple[int, ...] | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Refusal:
    """An engine's refusal.

    Attributes:
        messages: Dtype → what the engine said.
    """

    messages: dict[str, str]

    @property
    def message(self) -> str:
        """What it said, the last word on it."""
        return list(self.messages.values())[-1]


def ask(
    engine: Engine,
    jobs: Sequence[Job],
    on_answer: Callable[[int, Answer | Refusal], None] | None = None,
) -> list[Answer | Refusal]:
    """Asks an engine about several models.

    Args:
        engine: Where it is.
        jobs: What is asked.
        on_answer: Called with a job's index and its answer, as soon as it is there.

    Returns:
        For each job the answer, or the engine's refusal.

    Raises:
        ConfigError: If the engine is not installed where it was said to be.
        ResourceError: If it took more than `MINUTES_AT_MOST` for each model.
    """
    found: dict[int, Answer | Refusal] = {}

    def gather(left: Sequence[int]) -> None:
        for index in left:
            if index in found:
                continue
            answer = _read(Path(scratch) / str(index), jobs[index])
            if answer is None:
                return
            keep(index, answer)

    def keep(index: int, answer: Answer | Refusal) -> None:
        found[index] = answer
        if on_answer is not None:
            on_answer(index, answer)

    with tempfile.TemporaryDirectory() as scratch:
        while len(found) < len(jobs):
            left = [index for index in range(len(jobs)) if index not in found]
            plain = [_plain(jobs[index], Path(scratch) / str(index)) for index in left]
            said = _process(engine, plain, lambda left=left: gather(left))
            missing = [index for index in left if index not in found]
            if missing:
                keep(missing[0], Refusal({"process": said}))
    return [found[index] for index in range(len(jobs))]


def _plain(job: Job, out: Path) -> dict[str, Any]:
    plain = {
        "model": str(job.model.resolve()),
        "sequences": job.questions.sequences_NT.tolist(),
        "prompts": [list(prompt) for prompt in job.questions.prompts],
        "new_tokens": job.questions.new_tokens,
        "dtypes": list(job.dtypes),
        "out": str(out),
    }
    return plain if job.text is None else {**plain, "text": job.text}


def _process(engine: Engine, jobs: list[dict[str, Any]], gather: Callable[[], None]) -> str:
    """Runs the engine over jobs, gathering answers meanwhile; returns the end of what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        file, errors = Path(scratch) / "jobs.json", Path(scratch) / "errors"
        file.write_text(json.dumps(jobs), encoding="utf-8")
        command = [str(file) if part == JOBS else part for part in engine.command]
        with errors.open("wb") as log:
            child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=log,
                env={**os.environ, **engine.environment},
            )  # fmt: skip
            try:
                _wait(child, 60 * MINUTES_AT_MOST * len(jobs), gather)
            except subprocess.TimeoutExpired:
                raise ResourceError(
                    f"took more than {MINUTES_AT_MOST} minutes for each of {len(jobs)} models.",
                    where=engine.name,
                    remedy="Run it on a larger machine.",
                ) from None
            finally:
                child.kill()
                child.wait()
        text = errors.read_text(encoding="utf-8", errors="replace")
    last = " ".join(text.strip().splitlines()[-3:])[-1000:]
    if child.returncode == NOT_INSTALLED:
        raise engine.missing(last)
    return last or f"the process ended with exit code {child.returncode} and no message."


def _wait(child: subprocess.Popen[bytes], seconds: float, gather: Callable[[], None]) -> None:
    """Waits for a process to end, gathering what it has answered.

    Raises:
        TimeoutExpired: If it takes longer.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            child.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            gather()
            if time.monotonic() > until:
                raise
        else:
            gather()
            return


def _read(out: Path, job: Job) -> Answer | Refusal | None:
    """The answer of a job; None where there is none."""
    file = Path(f"{out}.json")
    if not file.is_file():
        return None
    said = json.loads(file.read_text("utf-8"))
    if "generated" not in said:
        return Refusal(said["refused"])
    raw = bytearray(Path(f"{out}.f32").read_bytes())
    sequences, tokens = job.questions.sequences_NT.shape
    rows = torch.frombuffer(raw, dtype=torch.float32).view(sequences, tokens - 1, -1)
    return Answer(
        version=said["version"],
        dtype=said["dtype"],
        rows_NTV=rows,
        generated=tuple(map(tuple, said["generated"])),
        refused=said["refused"],
        tokens=None if said.get("tokens") is None else tuple(said["tokens"]),
        chat_template=said.get("chat_template"),
    )
