"""Same recipe, seed and machine: same bytes twice?

Compresses the same model twice into two directories and compares every file. Files that may hold
times (report, metrics, model card) are listed apart; any other difference is a failure.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from harness import (
    SCRATCH,
    differences,
    digests,
    environment,
    must,
    pocketlm,
    publish,
    run_child,
    table,
)
from synthetic import write_tiny


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="any source; default: a tiny random model written here")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 where a file that must not differ does."""
    arguments = parse()
    model = arguments.model
    if model is None:
        model = str(write_tiny(SCRATCH / "tiny"))
    found = []
    for name in ("reproducible-1", "reproducible-2"):
        output = SCRATCH / name
        shutil.rmtree(output, ignore_errors=True)
        command = pocketlm(
            "compress", model, "--output", output, "--method", arguments.method, "--bits", "4",
            "--group-size", "128", "--samples", str(arguments.samples),
            "--seq-len", str(arguments.seq_len), "--threads", str(arguments.threads),
            "--seed", "0", "--restart", "--json",
        )  # fmt: skip
        must(run_child(command, {"OMP_NUM_THREADS": str(arguments.threads)}), "pocketlm compress")
        found.append(digests(output))
    wrong, timed = differences(*found)
    verdict = {**dict.fromkeys(wrong, "DIFFERENT"), **dict.fromkeys(timed, "but for times")}
    rows = [(name, found[0][name][:16], verdict.get(name, "yes")) for name in found[0]]
    shown = (
        f"{table(('file', 'sha256 of the first', 'same'), rows)}\n\n"
        f"{model}, {arguments.method}: {len(wrong)} files differ that must not {wrong}; "
        f"files with times that differ: {timed}."
    )
    result = {
        "environment": environment(arguments.threads),
        "model": model,
        "differing": wrong,
        "differing_timed": timed,
        "met": not wrong,
    }
    publish("Same recipe, seed and machine: same bytes twice", shown, result, arguments.record)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
