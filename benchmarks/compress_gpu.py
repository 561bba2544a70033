"""How long does one block of Llama-3-8B take to compress on a GPU, and where does the time go?

Writes a checkpoint of that shape with a few blocks (bfloat16, random weights: good for time, not
for quality), compresses it with each method on 128 windows of 2048 tokens, and tells for each block
after the first (which also compiles kernels and finds folds) the seconds, by what the GPU was given
to do; the peak of allocated GPU memory; and the floor: what the arithmetic takes at the rates of
matrix products measured in the same run. `--peer-python` times llm-compressor on the same
checkpoint and device. Without a GPU, or with --tiny, everything runs in small.

Figures, on one H100: GPTQ at most 1.5 s a block and 8 GiB, SparseGPT 2:4 at most 2 s, AWQ at most
2.5 s and 10 GiB.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import SCRATCH, environment, must, publish, run_child, table
from synthetic import Shape, write_llama

import pocketlm
from pocketlm.core.errors import PocketLMError

GIB = 2**30
W4 = {"bits": 4, "group_size": 128}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"steps": ["rtn"], "weights": W4},
    "gptq": {"steps": ["gptq"], "weights": W4},
    "clip-gptq-refine": {"steps": ["clip", "gptq", "refine"], "weights": W4},
    "sparsegpt": {"steps": [{"method": "sparsegpt", "sparsity": "2:4"}], "weights": None},
    "awq": {"steps": ["awq", "clip", "rtn"], "weights": W4},
}
FIGURES = {  # seconds a block, GiB
    "gptq": (1.5, 8.0),
    "clip-gptq-refine": (1.5, 8.0),
    "sparsegpt": (2.0, None),
    "awq": (2.5, 10.0),
}
PARTS = (  # what is timed: module, object or class, function, and what it counts as
    ("pocketlm.models.load", "Loader", "fill", "read"),
    ("pocketlm.models.run", "Run", "advance", "forward"),
    ("pocketlm.models.block", "Block", "forward", "forward"),
    ("pocketlm.core.stats", "Hessian", "add", "Hessian"),
    ("pocketlm.engine.health", "InputWatch", "add", "health"),
    ("pocketlm.engine.health", "InputWatch", "health", "health"),
    ("pocketlm.core.stats", None, "inverse_factor", "solve"),
    ("pocketlm.core.feedback", None, "sweep", "sweep"),
    ("pocketlm.quant.clip", None, "searched_grid", "clip"),
    ("pocketlm.quant.refine", None, "renewed_scales", "scales"),
    ("pocketlm.quant.refine", None, "renewed_codes", "codes"),
    ("pocketlm.quant.awq", "Awq", "scale", "search"),
    ("pocketlm.models.folds", "FoldProbe", "folds", "folds"),
    ("pocketlm.engine.block", None, "relative_error", "error"),
    ("pocketlm.engine.runner", "Runner", "_stored", "write"),
    ("pocketlm.formats.compressed_tensors", None, "encode", "write"),
    ("pocketlm.formats.pocketlm", None, "encode", "write"),
    ("pocketlm.engine.writing", "BlockWriter", "write", "write"),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds of one block on a GPU, by part.")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="a small shape, as without a GPU")
    parser.add_argument("--directory", type=Path, default=SCRATCH / "compress-gpu")
    parser.add_argument("--profile", type=Path, help="directory for torch.profiler's tables")
    parser.add_argument("--peer-python", type=Path, help="interpreter with llm-compressor")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


class Parts:
    """Times of the parts of a run, each less what is inside it: on the GPU's clock, or ours.

    Args:
        cuda: Whether there is a GPU.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._open: list[list[Any]] = []
        self._names = ["other"]
        self.peaks: dict[str, int] = defaultdict(int)
        self._spans: list[tuple[str, Any, Any, list[Any]]] = []

    def now(self) -> Any:
        """An instant, that may still lie ahead of a GPU."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times what happens inside as `name`."""
        self.peak()
        start, inner = self.now(), []
        self._open.append(inner)
        self._names.append(name)
        try:
            yield
        finally:
            self.peak()
            self._names.pop()
            self._open.pop()
            span = (name, start, self.now(), inner)
            self._spans.append(span)
            if self._open:
                self._open[-1].append(span)

    def peak(self) -> None:
        """Ascribes the highest bytes allocated since the last call to what is open."""
        if self._cuda:
            most = max(self.peaks[self._names[-1]], torch.cuda.max_memory_allocated())
            self.peaks[self._names[-1]] = most
            torch.cuda.reset_peak_memory_stats()

    def _seconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1000 if self._cuda else stop - start

    def taken(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for name, start, stop, inner in self._spans:
            within = sum(self._seconds(i[1], i[2]) for i in inner)
            total[name] += self._seconds(start, stop) - within
        self._spans.clear()
        return dict(total)


@contextmanager
def timed(parts: Parts) -> Iterator[None]:
    """Times the functions of PARTS while the context is open."""
    undo: list[tuple[Any, str, Any]] = []
    for module, owner, name, label in PARTS:
        holder = importlib.import_module(module)
        holder = holder if owner is None else getattr(holder, owner)
        plain = getattr(holder, name)
        undo.append((holder, name, plain))
        setattr(holder, name, _timed(plain, parts, label))
    try:
        yield
    finally:
        for holder, name, plain in undo:
            setattr(holder, name, plain)


def _timed(plain: Callable[..., Any], parts: Parts, label: str) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        with parts.span(label):
            return plain(*args, **kwargs)

    return call


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of products in bfloat16 and float32, and bytes/s of a copy; large ones on a GPU."""
    side = 8192 if device.type == "cuda" else 512

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2 * side**3 / best(lambda a=a, b=b: a @ b)
    source = torch.empty(side * side * 8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * 4 * source.numel() / best(lambda: target.copy_(source))
    return found


def floor_seconds(method: str, shape: Shape, tokens: int, seq_len: int, rate: Any) -> float:
    """What a block's arithmetic takes at the measured rates: two forwards, and the method's own.

    Hessians by half (they are symmetric) in bfloat16; Cholesky and inverse, 2/3 n³, and the sweep's
    updates, rows x columns², in float32; AWQ's 41 trials in bfloat16.
    """
    narrow = shape.hidden * shape.key_value_heads // shape.heads
    groups = (
        (shape.hidden, shape.hidden + 2 * narrow),
        (shape.hidden, shape.hidden),
        (shape.hidden, 2 * shape.inner),
        (shape.inner, shape.hidden),
    )
    weights = sum(columns * rows for columns, rows in groups)
    forward = 2 * tokens * weights + 2 * tokens * seq_len * shape.hidden  # causal attention
    bf16, fp32 = 2 * forward, 0.0
    if method != "rtn":
        bf16 += tokens * sum(columns**2 for columns, _ in groups)
    if "gptq" in method or method == "sparsegpt":
        fp32 += sum(columns**3 * 2 / 3 + rows * columns**2 for columns, rows in groups)
    if method == "awq":
        bf16 += 41 * 2 * sum(rows * columns**2 for columns, rows in groups)
    return (0 if method == "rtn" else bf16) / rate["bf16"] + fp32 / rate["fp32"]


def compress(
    method: str, model: Path, text: Path, arguments: argparse.Namespace, parts: Parts
) -> dict[str, Any]:
    """One run; seconds and parts of each block, and the peak of GPU memory."""
    blocks: list[dict[str, Any]] = []
    started = time.perf_counter()

    def listen(event: Any) -> None:
        nonlocal started
        if event.kind == "block_started":
            if not blocks:
                parts.taken()
                started = time.perf_counter()
        elif event.kind == "block_done":
            taken = parts.taken()
            blocks.append({"seconds": time.perf_counter() - started, "parts": taken})
            started = time.perf_counter()

    output = arguments.directory / f"out-{method}"
    shutil.rmtree(output, ignore_errors=True)
    cuda = torch.cuda.is_available() and not arguments.tiny
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with timed(parts):
        begun = time.perf_counter()
        result = pocketlm.compress(
            model, RECIPES[method], output, resume=False, on_event=listen,
            calibration=str(text), samples=arguments.samples, seq_len=arguments.seq_len,
            device="cuda" if cuda else "cpu",
        )  # fmt: skip
        whole = time.perf_counter() - begun
    parts.peak()
    peak = max(parts.peaks.values(), default=0)
    print({name: round(most / GIB, 2) for name, most in parts.peaks.items()}, file=sys.stderr)
    print(method, f"{whole:.1f} s in all", result.seconds, file=sys.stderr)
    shutil.rmtree(output)
    return {"blocks": blocks, "peak_gib": peak / GIB, "seconds": whole, "stages": result.seconds}


def profile(
    method: str, model: Path, text: Path, arguments: argparse.Namespace, directory: Path
) -> None:
    """torch.profiler's tables of one run."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profiler(activities=kinds) as found:
        compress(method, model, text, arguments, Parts(torch.cuda.is_available()))
    averages = found.key_averages()
    keys = ("self_cuda_time_total", "self_cpu_time_total")[not torch.cuda.is_available() :]
    shown = [averages.table(sort_by=key, row_limit=30, max_name_column_width=90) for key in keys]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"profile-{method}.txt").write_text("\n\n".join(shown))


def peer_seconds(method: str, model: Path, tokens: Path, arguments: argparse.Namespace) -> float:
    """llm-compressor's seconds a block, all blocks of the checkpoint."""
    name = "gptq" if "gptq" in method else method
    script = Path(__file__).with_name("peers") / "llmcompressor_run.py"
    command = [
        arguments.peer_python, script, model, arguments.directory / "peer", "--tokens", tokens,
        "--method", name, "--group-size", "128", "--dtype", "bfloat16", "--overwrite",
    ]  # fmt: skip
    if method == "sparsegpt":
        command += ["--sparsity", "2:4"]
    said = must(run_child(command), "llm-compressor").last_json()
    return float(said["oneshot_seconds"]) / arguments.blocks


def write_text(path: Path, characters: int) -> Path:
    """Random letters: one token each."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    path.write_text("".join(draw.choices(letters, k=characters)))
    return path


def main() -> int:
    """Exit code 1 where a figure is missed on an H100."""
    arguments = parse()
    cuda = torch.cuda.is_available() and not arguments.tiny
    shape = Shape(blocks=arguments.blocks, vocabulary=1024)
    if not cuda:
        shape = replace(shape, hidden=256, inner=896, heads=4, key_value_heads=2)
        arguments.samples, arguments.seq_len = min(arguments.samples, 8), 128
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    directory = arguments.directory
    model = write_llama(directory / f"model-{arguments.blocks}-{shape.hidden}", shape)
    tokens = arguments.samples * arguments.seq_len
    text = write_text(directory / "text.txt", 2 * tokens + 10_000)
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else environment()["device"]
    rate = rates(device)
    rows, runs, missed = [], {}, False
    for method in arguments.methods.split(","):
        try:
            run = compress(method, model, text, arguments, Parts(cuda))
        except (PocketLMError, RuntimeError) as error:
            print(method, error, file=sys.stderr)
            rows.append((method, *["failed"] * 7))
            missed = True
            continue
        later = run["blocks"][1:] or run["blocks"]
        seconds = statistics.median(block["seconds"] for block in later)
        names = dict.fromkeys(name for block in later for name in block["parts"])
        parts = {n: statistics.median(b["parts"].get(n, 0.0) for b in later) for n in names}
        parts["other"] = seconds - sum(parts.values())
        least = floor_seconds(method, shape, tokens, arguments.seq_len, rate)
        run |= {"seconds_a_block": seconds, "parts": parts, "floor_seconds": least}
        if arguments.peer_python:
            windows = directory / "tokens.npy"
            save_tokens(windows, shape, arguments)
            run["peer_seconds_a_block"] = peer_seconds(method, model, windows, arguments)
        allowed, gib = FIGURES.get(method, (None, None))
        late = allowed is not None and seconds > allowed
        large = gib is not None and run["peak_gib"] > gib
        verdict = "–" if allowed is None else f"{allowed} s" + (f", {gib} GiB" if gib else "")
        if allowed is not None and cuda:
            verdict += ": missed" if late or large else ": met"
            missed |= (late or large) and "H100" in name
        shown = ", ".join(f"{n} {s:.2f}" for n, s in parts.items() if s >= 0.005)
        rows.append(
            (method, f"{seconds:.2f}", f"{run['blocks'][0]['seconds']:.2f}", f"{least:.2f}",
             f"{run['peak_gib']:.1f}", run.get("peer_seconds_a_block", "–"), verdict, shown)
        )  # fmt: skip
        print(*rows[-1], file=sys.stderr)
        runs[method] = run
        if arguments.profile:
            profile(method, model, text, arguments, arguments.profile)
    header = ("recipe", "s a block", "first", "floor", "peak GiB", "peer", "figure", "by part")
    told = (
        f"{table(header, rows)}\n\n{name}: bf16 {rate['bf16'] / 1e12:.0f} TFLOP/s, "
        f"fp32 {rate['fp32'] / 1e12:.1f}, copy {rate['copy'] / 1e12:.2f} TB/s; "
        f"{arguments.samples} windows of {arguments.seq_len} tokens, hidden {shape.hidden}, "
        f"FFN {shape.inner}."
    )
    where = {**environment(), "device": name}
    result = {"environment": where, "rates": rate, "runs": runs}
    publish("Seconds to compress one block on a GPU", told, result, arguments.record)
    return int(missed)


def save_tokens(path: Path, shape: Shape, arguments: argparse.Namespace) -> None:
    """Random token windows for the peer: of as many tokens as ours."""
    import numpy

    draw = numpy.random.default_rng(0)
    numpy.save(path, draw.integers(2, 256, (arguments.samples, arguments.seq_len)))


if __name__ == "__main__":
    sys.exit(main())
