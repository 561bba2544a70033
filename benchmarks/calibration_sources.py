"""Which text should a model be calibrated on? Five sources, each tested on four kinds of text.

The same recipe and number of tokens each time; only the text differs. Sources: builtin; self (the
model writes it); WikiText-2 train; the first halves of a C4 sample and of a sample of code. Tests:
builtin's evaluation half; WikiText-2 test; the second halves. Every cell is a loss over the
original on the same windows. Artifacts are kept: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import DATA, SCRATCH, environment, publish, table
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs
from losses import interval_text, measure


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--texts", type=Path, default=DATA, help="directory of the four texts")
    parser.add_argument("--recipe", default='{"steps": ["clip", "gptq", "refine"], '
                        '"weights": {"bits": 3, "group_size": 64}}', help="as JSON")  # fmt: skip
    parser.add_argument("--sources", nargs="*", help="of the five; default: all")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=1024, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="sources at once")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "calibration-sources")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def halves(file: Path, scratch: Path) -> tuple[str, str]:
    """A text's first and second half, cut at a line end, as files."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    written = []
    for name, part in (
        ("first", lines[: len(lines) // 2]),
        ("second", lines[len(lines) // 2 :]),
    ):
        half = scratch / f"{file.stem}-{name}{file.suffix}"
        half.write_text("".join(part), encoding="utf-8")
        written.append(str(half))
    return written[0], written[1]


def row(source: str, calibration: str, tests: dict[str, str], options: dict[str, Any]) -> dict:
    """One source: its artifact, measured on every test; runs in a process of its own."""
    from pocketlm import api

    output = Path(options["scratch"]) / source
    api.compress(
        options["original"], recipe=json.loads(options["recipe"]), output=output,
        samples=options["samples"], seq_len=options["seq_len"], calibration=calibration, seed=SEED,
        device=options["device"], threads=options["threads"],
    )  # fmt: skip
    return {
        name: measure(source, None, output, {**options, "test": test})
        for name, test in tests.items()
    }


def main() -> int:
    """Prints the table: a row a source, a column a test."""
    arguments = parse()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    c4, code = (halves(arguments.texts / n, arguments.scratch) for n in ("c4.jsonl", "code.txt"))
    wikitext = [str(arguments.texts / f"wikitext2-{part}.txt") for part in ("train", "test")]
    sources = {
        "builtin": "builtin", "self": "self", "wikitext": wikitext[0], "c4": c4[0],
        "code": code[0],
    }  # fmt: skip
    tests = {"builtin": "builtin", "wikitext": wikitext[1], "c4": c4[1], "code": code[1]}
    chosen = arguments.sources or list(sources)
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("texts", "sources", "jobs", "record")
    }
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        jobs = {name: pool.submit(row, name, sources[name], tests, options) for name in chosen}
        found = {name: job.result() for name, job in jobs.items()}
    rows = []
    for name, measured in found.items():
        losses = [one["loss"] for one in measured.values()]
        mean = sum(loss[0] for loss in losses) / len(losses)
        cells = [interval_text(loss) for loss in losses]
        rows.append((name, *cells, f"{mean:.4f}"))
    shown = (
        f"{table(('calibrated on', *tests, 'mean'), rows)}\n\n"
        f"Loss over the original. Recipe {arguments.recipe}; {arguments.samples} x "
        f"{arguments.seq_len} tokens, seed {SEED}; tests of {arguments.windows} x "
        f"{arguments.window} tokens, float32."
    )
    result = {"environment": environment(arguments.threads), "found": found}
    publish("Which text to calibrate on", shown, result, arguments.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
