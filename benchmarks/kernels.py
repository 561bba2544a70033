"""Weight-only products on this GPU: time, share of the bound, beside bfloat16 and PyTorch's int4.

Every time is a CUDA graph's replay over so many copies of the weight that none is in the
second-level cache when its turn comes; the median of some replays. Copy bandwidth and the rate of a
large bfloat16 product are measured in the same run; the bound of a product is the larger of
(bytes of packed weight and scales, activations, results) / bandwidth and operations / rate.

    python benchmarks/kernels.py            the table
    python benchmarks/kernels.py --tune     tries launches, writes kernels/triton/launches.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from pocketlm.core.tensors import PackedInt
from pocketlm.evaluate.hardware import copy_bandwidth
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.cuda import Int4Cuda
from pocketlm.runtime.kernels.select import TABLE
from pocketlm.runtime.kernels.triton import launches
from pocketlm.runtime.kernels.triton.kernel import (
    TritonWeights,
    decode_product,
    prefill_product,
    replayed,
    wide_product,
)
from pocketlm.runtime.kernels.triton.launches import Launch
from pocketlm.runtime.prompt_graphs import MOST

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (4096, 28672), (4096, 6144))  # I, O
TOKENS = (1, 8, 16, 64, 512)
MANY_TOKENS = (32, 48, 128, 256, 320, 2048)  # the first shape only
GROUP = 128
COMPILED_ROWS = 8800  # of a weight on which a launch is tried: more than one tile a program
COLD_BYTES = 240 << 20  # copies of a weight together: several times the second-level cache
BF16 = torch.bfloat16
DEVICE = torch.device("cuda", 0)

Buffers = Mapping[str, Tensor]
Product = Callable[[Tensor, Buffers, Grid], Tensor]


def random_weight(rows: int, columns: int, bits: int, symmetric: bool = True) -> PackedInt:
    """Random codes and scales on the GPU, groups of 128."""
    draw = torch.Generator(DEVICE).manual_seed(rows + columns + bits)
    half, groups = 1 << (bits - 1), columns // GROUP
    shape, options = (rows, groups), {"generator": draw, "device": DEVICE}
    codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8, **options)
    scale_OG = (torch.rand(shape, **options) * 0.01 + 0.001).to(BF16)
    zero_OG = None if symmetric else torch.randint(-half, half, shape, dtype=torch.int8, **options)
    return PackedInt(codes_OI, scale_OG, zero_OG, bits)


def replay_ms(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Milliseconds of one call, of calls recorded into one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (3 * len(calls)))
    return statistics.median(times)


def copies_of(buffers: Buffers) -> list[dict[str, Tensor]]:
    """So many copies that going round through them finds none in the cache."""
    count = max(4, COLD_BYTES // bytes_of(buffers))
    return [{name: b.clone() for name, b in buffers.items()} for _ in range(count)]


def bytes_of(buffers: Buffers) -> int:
    """Bytes of all buffers."""
    return sum(b.numel() * b.element_size() for b in buffers.values())


def rounds(copies: int, tokens: int) -> int:
    """How often a graph goes round: enough calls to hide its start."""
    return max(1, (48 if tokens <= 32 else 16) // copies)


def product_ms(product: Product, copies: Sequence[Buffers], grid: Grid, tokens: int) -> float:
    """Milliseconds of a product with that many activations."""
    x_MI = torch.randn(tokens, grid.columns, device=DEVICE, dtype=BF16)
    calls = [lambda b=b: product(x_MI, b, grid) for b in copies]
    return replay_ms(calls * rounds(len(calls), tokens))


def dense_ms(columns: int, rows: int, tokens: int) -> float:
    """Milliseconds of cuBLAS in bfloat16."""
    count = max(2, COLD_BYTES // (2 * rows * columns))
    weights = [torch.randn(rows, columns, device=DEVICE, dtype=BF16) for _ in range(count)]
    x_MI = torch.randn(tokens, columns, device=DEVICE, dtype=BF16)
    calls = [lambda w=w: torch.nn.functional.linear(x_MI, w) for w in weights]
    return replay_ms(calls * rounds(count, tokens))


def ceilings() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a bfloat16 product)."""
    copied = copy_bandwidth(DEVICE)
    x = torch.randn(8192, 8192, device=DEVICE, dtype=BF16)
    multiplied = replay_ms([lambda: x @ x] * 4)
    return copied, 2 * 8192**3 / multiplied * 1e3


def bound_ms(buffers: Buffers, grid: Grid, tokens: int, limits: tuple[float, float]) -> float:
    """The least time that bytes and operations allow."""
    moved = bytes_of(buffers) + 2 * tokens * (grid.rows + grid.columns)
    return 1e3 * max(moved / limits[0], 2 * tokens * grid.rows * grid.columns / limits[1])


def table_product(x_MI: Tensor, buffers: Buffers, grid: Grid) -> Tensor:
    """Ours, as the runtime's table calls it; in a graph, where the runtime has one."""
    row = next(row for row in TABLE if row.kernel.name == "triton")
    many = row.tiles_from is not None and x_MI.shape[0] >= row.tiles_from
    kernel = row.kernel
    with replayed() if x_MI.shape[0] <= MOST else nullcontext():
        return (kernel.matmul_tiles if many else kernel.matmul)(x_MI, buffers, grid)


def measure() -> dict[str, Any]:
    """The table: one row for each shape, width and number of activations."""
    limits, rows = ceilings(), []
    for columns, outputs in SHAPES:
        for tokens in TOKENS + (MANY_TOKENS if (columns, outputs) == SHAPES[0] else ()):
            rows.append({"I": columns, "O": outputs, "M": tokens, "bits": 4})
            rows[-1]["bf16_ms"] = dense_ms(columns, outputs, tokens)
        weight = random_weight(outputs, columns, 4)
        grid = Grid.of(weight)
        fill(rows, "tinygemm_ms", Int4Cuda(), weight, grid, limits)
        fill(rows, "ours_ms", TritonWeights(), weight, grid, limits)
    columns, outputs = SHAPES[0]
    dense = {row["M"]: row["bf16_ms"] for row in rows if (row["I"], row["O"]) == SHAPES[0]}
    for bits in (2, 3, 8):
        extra = [{"I": columns, "O": outputs, "M": m, "bits": bits} for m in (1,)]
        weight = random_weight(outputs, columns, bits)
        fill(extra, "ours_ms", TritonWeights(), weight, Grid.of(weight), limits)
        rows += [{**row, "bf16_ms": dense[row["M"]]} for row in extra]
    return {"copy_bytes_per_s": limits[0], "bf16_flop_per_s": limits[1], "rows": rows}


def fill(
    rows: list[dict[str, Any]],
    name: str,
    kernel: Int4Cuda | TritonWeights,
    weight: PackedInt,
    grid: Grid,
    limits: tuple[float, float],
) -> None:
    """Times a kernel for the rows that have the weight's shape."""
    copies = copies_of(kernel.pack(weight, BF16, DEVICE))
    product = kernel.matmul if isinstance(kernel, Int4Cuda) else table_product
    for row in rows:
        if (row["I"], row["O"], row["bits"]) != (grid.columns, grid.rows, weight.bits):
            continue
        if name == "tinygemm_ms" and row["M"] > 64:  # slower than bfloat16 by then, and long
            continue
        row[name] = product_ms(product, copies, grid, row["M"])
        if name == "ours_ms":
            row["bound_ms"] = bound_ms(copies[0], grid, row["M"], limits)


def show(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        peer = row.get("tinygemm_ms")
        return (
            f"{row['I']}, {row['O']}",
            str(row["bits"]),
            str(row["M"]),
            f"{row['bf16_ms']:.4f}",
            "" if peer is None else f"{peer:.4f} ({row['bf16_ms'] / peer:.2f} x)",
            f"{row['ours_ms']:.4f} ({row['bf16_ms'] / row['ours_ms']:.2f} x)",
            f"{row['bound_ms']:.4f}",
            f"{row['bound_ms'] / row['ours_ms']:.0%}",
        )

    head = (
        "K, N",
        "bits",
        "M",
        "bf16 ms",
        "tinygemm ms",
        "ours ms",
        "bound ms",
        "share",
    )
    rates = (
        f"copy {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"bf16 {result['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s, group {GROUP}, symmetric."
    )
    return harness.table(head, map(line, result["rows"])) + "\n\n" + rates


def candidates(tokens: int, columns: int, outputs: int) -> Iterator[Launch]:
    """Launches worth trying."""
    for warps, row_tiles, ahead, resident in FEW if tokens <= 8 else ():
        yield Launch("decode", warps=warps, row_tiles=row_tiles, ahead=ahead, resident=resident)
    for warps, row_tiles, ahead, early in SHARED if 2 <= tokens <= 16 else ():
        yield Launch(
            "decode", warps=warps, row_tiles=row_tiles, ahead=ahead, shared=True, early=early
        )
    for tile, width, warps, stages in MANY if tokens >= 16 else ():
        if tile > max(tokens, 16) or tile * 4 < min(tokens, 256):
            continue
        for splits in SPLITS:
            programs = splits * -(-outputs // (16 * warps)) * -(-tokens // tile)
            if splits == 1 or (programs <= 600 and columns // splits >= 1024):
                yield Launch("prefill", width, warps, tokens=tile, stages=stages, splits=splits)
    if tokens > WIDE_FROM:
        yield WIDE


# warps, row tiles, steps ahead, programs of a multiprocessor
FEW = (
    *((4, 1, 2, 0), (8, 1, 2, 0), (4, 1, 4, 0), (4, 2, 2, 0), (4, 1, 2, 5), (4, 1, 4, 4)),
    *((8, 1, 2, 2), (8, 1, 4, 2), (8, 1, 4, 1)),
)
# warps, row tiles, steps ahead, early
SHARED = ((4, 2, 1, True), (4, 2, 2, True), (4, 4, 1, True), (8, 1, 1, True), (8, 2, 1, False))
# activations of a tile, columns of a step, warps, stages
MANY = (
    *((16, 128, 4, 6), (32, 128, 4, 4), (64, 128, 4, 4), (64, 128, 8, 4), (128, 128, 8, 4)),
    *((256, 64, 8, 5),),
)
WIDE = Launch("wide", 64, 8, tokens=256, stages=5)
WIDE_FROM = 256  # activations: with fewer its launch costs the host more than the device saves
SPLITS = (1, 4, 8)
HEAD = (4096, 128256)
# Bits → the shapes and numbers of activations that are tuned; other widths take those of 4 bits.
TUNED = {
    4: {
        **{shape: (1, 8, 16, 32, 64, 128, 256, 512, 1024) for shape in SHAPES[:2]},
        **dict.fromkeys(SHAPES[2:], (1, 8, 16, 64, 256, 512, 1024)),
        HEAD: (1, 8, 64),
    },
}


def timed_product(launch: Launch) -> Product:
    """The product with a launch."""
    if launch.product == "wide":
        return lambda x_MI, buffers, grid: wide_product(x_MI, buffers, grid, launch)
    if launch.product == "prefill":
        return lambda x_MI, buffers, grid: prefill_product(x_MI, buffers, grid, launch)
    early = launch.early and torch.cuda.get_device_capability() >= (9, 0)
    return lambda x_MI, buffers, grid: decode_product(x_MI, buffers, grid, launch, early=early)


def compile_launch(case: tuple[int, Launch, int]) -> str | None:
    """Compiles a launch into Triton's cache and tries it; what went wrong, if anything."""
    bits, launch, tokens = case
    weight = random_weight(COMPILED_ROWS, 4096, bits)
    try:
        buffers = TritonWeights().pack(weight, BF16, DEVICE)
        x_MI = torch.randn(tokens, 4096, device=DEVICE, dtype=BF16)
        found_MO, again_MO = (timed_product(launch)(x_MI, buffers, Grid.of(weight)) for _ in "12")
        if not torch.equal(found_MO, again_MO):
            return "not the same bits twice"
        truth_MO = x_MI.double() @ weight.dequantize(torch.float64).T
        error = float((found_MO.double() - truth_MO).norm() / truth_MO.norm())
        return None if error < 8e-3 else f"relative error {error:.1e}"
    except Exception as error:  # too much shared memory, too many registers: not a candidate
        return str(error).splitlines()[0][:200]


def tune(workers: int, seconds: float) -> list[dict[str, Any]]:
    """Tries the candidates, and gives the fastest for each case as rows of the file.

    Args:
        workers: Processes that compile.
        seconds: After which no further case is begun.
    """
    stop = time.monotonic() + seconds
    cases = {
        (bits, launch, tokens if launch.product == "decode" else launch.tokens)
        for bits, shapes in TUNED.items()
        for (columns, outputs), counts in shapes.items()
        for tokens in counts
        for launch in candidates(tokens, columns, outputs)
    }
    ordered = sorted(cases, key=str)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failures = dict(zip(ordered, pool.map(compile_launch, ordered), strict=True))
    broken = {(bits, launch) for (bits, launch, _), why in failures.items() if why is not None}
    for (bits, launch, _), why in failures.items():
        if why is not None:
            print(f"{bits} bits, {launch}: {why}", file=sys.stderr)
    rows = []
    for bits, shapes in TUNED.items():
        for (columns, outputs), counts in shapes.items():
            weight = random_weight(outputs, columns, bits)
            grid = Grid.of(weight)
            copies = copies_of(TritonWeights().pack(weight, BF16, DEVICE))
            for tokens in counts:
                if time.monotonic() > stop:
                    return rows
                times = {
                    launch: product_ms(timed_product(launch), copies, grid, tokens)
                    for launch in candidates(tokens, columns, outputs)
                    if (bits, launch) not in broken
                }
                best = min(times, key=lambda launch: times[launch])
                print(f"{bits} bits, {columns} x {outputs}, {tokens}: {times[best]:.4f} ms {best}")
                sys.stdout.flush()
                row = launches.Measured(bits, outputs, columns, tokens, best, times[best] / 1e3)
                rows.append(asdict(row))
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Puts this device's rows into the file, and leaves other devices' as they are."""
    devices = json.loads(path.read_text("utf-8")) if path.exists() else {}
    devices[torch.cuda.get_device_name()] = rows
    parts = []
    for name, entries in sorted(devices.items()):
        lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
        parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


def main() -> None:
    """Measures, and tunes first where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="write launches.json first")
    parser.add_argument("--launches", type=Path, default=launches.FILE, help="where to write them")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=600, help="that tuning may take")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device.")
    if arguments.tune:
        write(tune(arguments.workers, arguments.seconds), arguments.launches)
        launches.FILE = arguments.launches
        launches.measured.cache_clear()
        launches.launch_for.cache_clear()
    environment = harness.environment() | {"device": torch.cuda.get_device_name()}
    environment["versions"]["triton"] = harness._version("triton")
    result = {"environment": environment, **measure()}
    harness.publish("weight-only products", show(result), result, arguments.record)


if __name__ == "__main__":
    main()
