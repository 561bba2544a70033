"""What does each method lose, at how many real bits, in how many seconds?

Every recipe of a YAML file (name → recipe) compresses the benchmark's original with the same
calibration tokens; each artifact is measured against the original on the same windows. Results are
kept one file a recipe: a run that was stopped goes on, and a recipe that changed is run again.
Artifacts of other tools join with --more and are measured alike.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from harness import environment, publish, table
from inputs import SEED
from losses import (
    Kept,
    asked_options,
    chosen_recipes,
    interval_text,
    loss_parser,
    measure,
    seconds_text,
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = loss_parser(__doc__, "methods")
    parser.add_argument(
        "--recipes", type=Path, default=Path(__file__).with_name("methods.yaml"),
        help="YAML: name → recipe",
    )  # fmt: skip
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="artifacts of other tools")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at once; their seconds suffer")
    return parser.parse_args()


def main() -> int:
    """Prints the table of all recipes."""
    arguments = parse()
    recipes = yaml.safe_load(arguments.recipes.read_text(encoding="utf-8"))
    chosen = chosen_recipes(recipes, arguments.only)
    options = asked_options(arguments)
    kept = Kept(arguments.scratch, options)
    jobs: dict[str, tuple[Any, Path | None]] = {n: (recipe, None) for n, recipe in chosen.items()}
    jobs |= {path.name: (str(path), path) for path in arguments.more}
    found: dict[str, dict] = {}
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        waiting = {}
        for name, (recipe, artifact) in jobs.items():
            known = kept.find(name, recipe)
            if known is None:
                waiting[pool.submit(measure, name, recipe, artifact, options)] = name
            else:
                found[name] = known
        for future in as_completed(waiting):
            name = waiting[future]
            try:
                one = found[name] = future.result()
            except Exception as error:  # one recipe that fails must not take the others along
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            kept.keep(name, jobs[name][0], one)
            print(f"{name}: loss {one['loss'][0]:.4f} kl {one['kl'][0]:.4f}", flush=True)
    if not found:
        return 1
    rows = [
        (
            name,
            "–" if one["bits"] is None else f"{one['bits']:.3f}",
            interval_text(one["loss"]),
            f"{one['kl'][0]:.4f}", f"{one['top1']:.4f}", f"{one['perplexity']:.3f}",
            seconds_text(one),
        )
        for name in jobs if name in found
        for one in [found[name]]
    ]  # fmt: skip
    header = ("recipe", "bits", "loss over original (95 %)", "KL", "top-1", "perplexity", "s")
    first = next(iter(found.values()))
    shown = (
        f"{table(header, rows)}\n\nOriginal: perplexity {first['original_perplexity']:.3f}. "
        f"Calibration {arguments.samples} x {arguments.seq_len} tokens of "
        f"{arguments.calibration.name}, seed {SEED}; {arguments.jobs} at once.\n"
        f"{first['protocol']}"
    )
    result = {"environment": environment(arguments.threads), "recipes": chosen, "found": found}
    publish("What each method loses", shown, result, arguments.record)
    return 0 if len(found) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
