"""How long does compression take: ours beside llm-compressor's GPTQ, equal threads, interleaved.

W4A16 symmetric g64 of the benchmark's original, 64 windows of 1024 tokens, the same ones. Each
round runs ours, then the peer's; the first read of the model warms the page cache. Two times each:
the compress stage (model on disk to artifact on disk, imports outside; ours includes choosing and
tokenizing the calibration text, the peer gets ready tokens), and the whole process.
Figure: our stage at most 0.4 times the peer's, medians of 3; with --method awq no slower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from harness import SCRATCH, Finished, environment, must, pocketlm, publish, run_child, table
from inputs import Inputs, peer_command

FIGURES = {"gptq": 0.4, "awq": 1.0, "sparsegpt": 0.4}  # of our stage's time to the peer's


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--method", choices=tuple(FIGURES), default="gptq", help="ours")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def stage_seconds(finished: Finished, key: str) -> float:
    """The duration of the compress stage that the tool itself states; ours by its parts."""
    said = finished.last_json()[key]
    return sum(said.values()) if isinstance(said, dict) else float(said)


def main() -> int:
    """Prints every run and the ratio of medians; exit code 1 where the figure is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    tokens = inputs.tokens_file()
    for file in arguments.original.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    threads = arguments.threads
    ours_command = pocketlm(
        *inputs.compress_arguments(SCRATCH / "time-ours", threads, method=arguments.method)
    )
    more = ["--dtype", arguments.peer_dtype]
    if arguments.method == "sparsegpt":  # values stay floats, in both tools
        at = ours_command.index("--bits")
        ours_command[at : ours_command.index("--sym") + 1] = ["--sparsity", "2:4"]
        more += ["--method", "sparsegpt", "--sparsity", "2:4"]
    peer_line = peer_command(
        arguments.peer_python, inputs, tokens, SCRATCH / "time-peer", threads, *more
    )
    pinned = {"OMP_NUM_THREADS": str(threads)}
    rows, stages, wholes = [], {"ours": [], "peer": []}, {"ours": [], "peer": []}
    for number in range(1, arguments.runs + 1):
        for who, command, key in (
            ("ours", ours_command, "seconds"),
            ("peer", peer_line, "compress_seconds"),
        ):
            finished = must(run_child(command, pinned), who)
            stages[who].append(stage_seconds(finished, key))
            wholes[who].append(finished.seconds)
            rows.append(
                (number, who, f"{stages[who][-1]:.1f}", f"{finished.seconds:.1f}",
                 f"{finished.peak_bytes / 2**20:.0f}")
            )  # fmt: skip
            print(*rows[-1], file=sys.stderr)
    ratio = statistics.median(stages["ours"]) / statistics.median(stages["peer"])
    whole = statistics.median(wholes["ours"]) / statistics.median(wholes["peer"])
    figure = FIGURES[arguments.method]
    met = ratio <= figure
    result = {
        "environment": environment(threads),
        "stage_seconds": stages,
        "process_seconds": wholes,
        "ratio": ratio,
        "process_ratio": whole,
        "figure": figure,
        "met": met,
        "peer": {"dtype": arguments.peer_dtype},
    }
    header = ("run", "tool", "compress stage s", "whole process s", "peak MiB")
    shown = (
        f"{table(header, rows)}\n\nRatio of medians, ours to the peer's ({arguments.peer_dtype}): "
        f"**{ratio:.3f}** of the stage, {whole:.3f} of the process; figure: at most {figure}: "
        f"{'met' if met else 'missed'}."
    )
    title = f"Time to compress, W4A16 symmetric g64, {arguments.method} beside the peer's GPTQ"
    if arguments.method == "sparsegpt":
        title = "Time to compress, 2:4 by SparseGPT, beside the peer's"
    publish(title, shown, result, arguments.record)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
