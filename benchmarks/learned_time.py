"""How long does AutoRound take: ours beside auto-round, equal iterations, samples, tokens, threads.

Symmetric, groups of 64, from a min-max grid, in float32 on a CPU and bfloat16 on a GPU; both tools
learn offsets and the grid's ends with batches of 8 windows, the same windows. Each round runs ours,
then the peer's. Times are of the compress stage: model on disk (warm page cache) to artifact on
disk, imports outside. Neither uses torch.compile. Figure: ours at most the peer's, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from compress_time import stage_seconds
from harness import SCRATCH, environment, must, pocketlm, publish, run_child, table
from inputs import SEED, Inputs

FIGURE = 1.0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def ours(arguments: argparse.Namespace, inputs: Inputs) -> list[str]:
    """The command line of our run."""
    recipe = SCRATCH / f"autoround-{arguments.iters}.yaml"
    step = {"method": "autoround", "iters": arguments.iters, "batch_size": 8}
    weights = {"bits": arguments.bits, "symmetric": True, "group_size": 64}
    recipe.write_text(json.dumps({"steps": [step], "weights": weights, "ignore": ["lm_head"]}))
    return pocketlm(
        "compress", inputs.original, "--output", SCRATCH / "learned-ours", "--recipe", recipe,
        "--calibration", inputs.calibration, "--samples", str(arguments.samples),
        "--seq-len", str(arguments.seq_len), "--seed", str(SEED), "--device", arguments.device,
        "--threads", str(arguments.threads), "--restart", "--json",
    )  # fmt: skip


def theirs(arguments: argparse.Namespace, inputs: Inputs) -> list[str]:
    """The command line of the peer's run, by its own environment's interpreter."""
    script = Path(__file__).with_name("peers") / "autoround_run.py"
    tokens = inputs.tokens_file(arguments.samples, arguments.seq_len)
    return [
        str(arguments.peer_python), str(script), str(inputs.original),
        str(SCRATCH / "learned-peer"), "--tokens", str(tokens), "--bits", str(arguments.bits),
        "--iters", str(arguments.iters), "--threads", str(arguments.threads),
        "--device", arguments.device,
    ]  # fmt: skip


def main() -> int:
    """Prints every run and the ratio of medians; exit code 1 where the figure is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for file in arguments.original.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    tools = (
        ("ours", ours(arguments, inputs), "seconds"),
        ("auto-round", theirs(arguments, inputs), "compress_seconds"),
    )
    pinned = {"OMP_NUM_THREADS": str(arguments.threads)}
    rows, stages = [], {name: [] for name, _, _ in tools}
    for number in range(1, arguments.runs + 1):
        for name, command, key in tools:
            finished = must(run_child(command, pinned), name)
            stages[name].append(stage_seconds(finished, key))
            rows.append(
                (number, name, f"{stages[name][-1]:.1f}", f"{finished.seconds:.1f}",
                 f"{finished.peak_bytes / 2**20:.0f}")
            )  # fmt: skip
            print(*rows[-1], file=sys.stderr)
    mine, peer = (statistics.median(stages[name]) for name in ("ours", "auto-round"))
    met = mine <= FIGURE * peer
    setting = {
        key: getattr(arguments, key)
        for key in ("iters", "samples", "seq_len", "bits", "device", "runs")
    }
    result = {
        "environment": environment(arguments.threads),
        "setting": {**setting, "original": str(arguments.original)},
        "stage_seconds": stages,
        "ratio": mine / peer,
        "figure": FIGURE,
        "met": met,
    }
    header = ("run", "tool", "compress stage s", "whole process s", "peak MiB")
    shown = (
        f"{table(header, rows)}\n\n{arguments.original.name}: {arguments.iters} iterations of 8 of "
        f"{arguments.samples} x {arguments.seq_len} tokens, {arguments.device}. Ratio of medians, "
        f"ours to the peer's: **{mine / peer:.3f}**; figure: at most {FIGURE}: "
        f"{'met' if met else 'missed'}."
    )
    publish(
        f"Time of AutoRound, W{arguments.bits}A16 symmetric g64", shown, result, arguments.record
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
