"""Tokens per second and peak memory of a model, in a child process of its own.

Prefill: prompt tokens / time to the first new token. Decode: further tokens / their time, greedy.
Both by the loop that `generate` runs (runtime/decode.py), median of runs after a warm-up.
Bound of decoding: a step reads every weight and the cache once, so it takes bytes / bandwidth.
The bandwidth is measured by copying (bytes read + bytes written). Experts that a token skips are
counted as read, so for mixtures of experts the achieved GB/s is too high; the report says so.

``python -m pocketlm.evaluate.speed MODEL`` measures in the running process; `measure_speed` starts
that and reads the result. The child's standard input is a pipe that only the parent holds open:
its end means that the parent is gone, however it went, and ends the child. That holds on every
system, and for a parent that was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import eval_windows
from pocketlm.core import errors
from pocketlm.core.errors import ConfigError, PocketLMError, ResourceError
from pocketlm.evaluate.devices import Device, matmul_rate
from pocketlm.evaluate.hardware import copy_bandwidth, device_name, weight_bytes_per_token
from pocketlm.evaluate.memory import peak_memory_bytes
from pocketlm.evaluate.results import SpeedReport, versions
from pocketlm.evaluate.roofline import Widths, roofline
from pocketlm.models.shape import model_shape
from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.load import load, packed_summary

WARM_UPS = {"cuda": 2}  # the second prompt of a size captures its graph; elsewhere one
MARK = "pocketlm-speed: "  # before the result, whatever libraries print around it
ERROR_MARK = "pocketlm-speed-error: "  # before an error of ours, by its parts


@dataclass(frozen=True)
class Timed:
    """One run.

    Attributes:
        first: Seconds to the first new token.
        steps: Seconds between each token and the one before.
    """

    first: float
    steps: tuple[float, ...]

    @property
    def later(self) -> float:
        """Seconds of all tokens after the first."""
        return sum(self.steps)


def time_generation(decoder: Decoder, prompt: list[int], new_tokens: int, context: int) -> Timed:
    """One run from an empty cache.

    Args:
        decoder: All its rows get the same prompt.
        prompt: Token ids.
        new_tokens: To generate, at least 2.
        context: Positions to fill before decoding; the prompt's own are among them.
    """
    decoder.cut(0)
    start = time.perf_counter()
    newest = decoder.prefill([prompt] * decoder.rows, room=new_tokens + context)
    newest.read()
    first = time.perf_counter() - start
    if context > len(prompt):
        more = (prompt * (context // len(prompt) + 1))[: context - len(prompt)]
        decoder.prefill([more] * decoder.rows, room=new_tokens).read()
    steps, last, newest = [], time.perf_counter(), decoder.step()
    for done in range(1, new_tokens):
        ahead = decoder.step() if decoder.runs_ahead and done + 1 < new_tokens else None
        newest.read()
        now = time.perf_counter()
        steps.append(now - last)
        last = now
        if done + 1 < new_tokens:
            newest = ahead or decoder.step()
    return Timed(first, tuple(steps))


def measure_here(
    source: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    runs: int = 3,
    batch: int = 1,
    context: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> SpeedReport:
    """Measures in this process; its peak memory counts whatever ran in it before.

    Args:
        source: What `pocketlm.load` takes.
        prompt_tokens: Of the prompt, from the builtin text.
        new_tokens: To generate, at least 2.
        runs: After the warm-ups.
        batch: Rows at once.
        context: Positions held when decoding begins; None: the prompt's.
        device: Where to run.
        dtype: Of the activations; None: as the model is stored.
        threads: Of the CPU; None: torch's default.
        trust_remote_code: Whether code from the checkpoint may run.

    Returns:
        The medians.

    Raises:
        ConfigError: If a count is too small or the dtype unknown.
    """
    if min(prompt_tokens, runs, batch) < 1 or new_tokens < 2:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {runs} runs, batch {batch}.",
            where="speed",
            remedy="Ask for at least 1, 2, 1 and 1.",
        )
    if threads is not None:
        torch.set_num_threads(threads)
    before = peak_memory_bytes()
    started = time.perf_counter()
    model, tokenizer = load(
        source, device=device, dtype=_dtype(dtype), trust_remote_code=trust_remote_code
    )
    load_seconds = time.perf_counter() - started
    text = load_text("builtin", "evaluation")
    # a window has two tokens at least; a prompt may have one
    prompt = eval_windows(tokenizer, text, prompt_tokens + 1, 1).tokens_NT[0, :prompt_tokens]
    held = max(context or 0, prompt_tokens)
    model.eval()
    decoder = Decoder(model, batch)
    for _ in range(WARM_UPS.get(model.device.type, 1)):
        time_generation(decoder, prompt.tolist(), min(8, new_tokens), held)
    times = [time_generation(decoder, prompt.tolist(), new_tokens, held) for _ in range(runs)]
    peak = peak_memory_bytes()  # before the bandwidth is measured, which takes memory too
    on_gpu = model.device.type == "cuda"
    device_peak = torch.cuda.max_memory_allocated() if on_gpu else None
    decode_runs = tuple(batch * (new_tokens - 1) / run.later for run in times)
    decode = statistics.median(decode_runs)
    first = statistics.median(run.first for run in times)
    steps = sorted(step for run in times for step in run.steps)
    packed = packed_summary(model)
    weight_bytes, notes = weight_bytes_per_token(model)
    reasons = Counter(packed.fallbacks.values())
    notes += tuple(f"{count} linears have no fast kernel: {why}." for why, count in reasons.items())
    notes += tuple(decoder.notes)
    if peak is None:
        notes += ("peak memory is not known on this system.",)
    bandwidth, rate = copy_bandwidth(model.device), matmul_rate(model.device)
    seen = held + new_tokens // 2
    asked = roofline(
        model_shape(source, trust_remote_code=trust_remote_code),
        Device.bare(bandwidth, rate),
        batch=batch,
        prompt=prompt_tokens,
        context=seen,
        widths=Widths(cache=torch.finfo(model.dtype).bits),
    )
    step_bytes = weight_bytes + asked.cache_bytes
    return SpeedReport(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        prefill_tokens_per_second=batch * prompt_tokens / first,
        decode_tokens_per_second=decode,
        decode_runs=decode_runs,
        weight_bytes_per_token=weight_bytes,
        achieved_bytes_per_second=step_bytes * decode / batch,
        bandwidth_bytes_per_second=bandwidth,
        bound_tokens_per_second=batch * bandwidth / step_bytes,
        peak_memory_bytes=peak,
        memory_before_load_bytes=before,
        peak_device_memory_bytes=device_peak,
        load_seconds=load_seconds,
        device=str(model.device),
        hardware=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=dict(packed.kernels),
        versions=versions(),
        notes=notes,
        batch=batch,
        context=held,
        first_token_seconds=first,
        token_seconds_p50=steps[len(steps) // 2],
        token_seconds_p99=steps[min(len(steps) - 1, int(0.99 * len(steps)))],
        cache_bytes_per_step=asked.cache_bytes,
        prefill_operations_per_second=asked.prefill.operations / first,
        decode_operations_per_second=asked.decode.operations * decode / batch,
        rate_operations_per_second=rate,
        loop=decoder.loop,
    )


def measure_speed(source: str | Path, **options: Any) -> SpeedReport:
    """Measures in a child process, so that peak memory is the model's alone.

    Args:
        source: What `pocketlm.load` takes.
        **options: As `measure_here` takes them.

    Returns:
        What the child measured.

    Raises:
        PocketLMError: The child's own error.
        ResourceError: If the child ended without one: with its last words.
    """
    command = [sys.executable, "-m", "pocketlm.evaluate.speed", str(source), "--child"]
    for name, value in options.items():
        if value is not None and value is not False:
            command.append(f"--{name.replace('_', '-')}")
            command += [] if value is True else [str(value)]
    child_end, our_end = os.pipe()
    try:
        child = subprocess.run(
            command, stdin=child_end, capture_output=True, text=True, check=False
        )
    finally:
        os.close(child_end)
        os.close(our_end)
    lines = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and lines:
        return SpeedReport.model_validate_json(lines[-1].removeprefix(MARK))
    told = [line for line in child.stdout.splitlines() if line.startswith(ERROR_MARK)]
    if told:
        raise _error_of(told[-1].removeprefix(ERROR_MARK))
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    killed = f" (signal {-child.returncode})" if child.returncode < 0 else ""
    raise ResourceError(
        f"the measuring process ended with {child.returncode}{killed}: {last}",
        where=str(source),
        remedy="If it was killed, the model does not fit in memory.",
    )


def _error_line(error: PocketLMError) -> str:
    """An error in one line, as an instance of the nearest of its types that `errors` has."""
    kind = next(each for each in type(error).__mro__ if each.__module__ == errors.__name__)
    parts = {"what": error.what, "where": error.where, "remedy": error.remedy}
    return json.dumps({"kind": kind.__name__, **parts})


def _error_of(line: str) -> PocketLMError:
    """The error that `_error_line` wrote."""
    parts = json.loads(line)
    kind: type[PocketLMError] = getattr(errors, parts.pop("kind"))
    return kind(parts.pop("what"), **parts)


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None or name in known:
        return None if name is None else known[name]
    raise ConfigError(
        f"unknown dtype '{name}'.", where="--dtype", remedy=f"Known: {', '.join(known)}."
    )


def _end_with_parent() -> None:
    """Waits for the end of the pipe that the parent holds open."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def main() -> int:
    """The child's command line."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.evaluate.speed")
    parser.add_argument("source", metavar="MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--child",
        action="store_true",
        help="end with standard input, and give the result as one line for the parent",
    )
    options = vars(parser.parse_args())
    is_child = options.pop("child")
    if is_child:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        report = measure_here(options.pop("source"), **options)
    except PocketLMError as error:
        print(error, file=sys.stderr)
        if is_child:
            print(ERROR_MARK + _error_line(error))
        return error.exit_code
    print(MARK + report.model_dump_json() if is_child else report.model_dump_json(indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
