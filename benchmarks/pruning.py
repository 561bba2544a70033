"""Pruning beside llm-compressor: does ours lose as much where it should, and less where it can?

Every recipe of pruning.yaml and the peer's magnitude, Wanda and SparseGPT, at 50 % and at 2:4, on
the same original with the same calibration tokens, measured on the same windows (methods.py). Then
the figures: Wanda and magnitude within 3 % of the peer's loss; the best one-shot recipe at most
0.85 times the loss of its SparseGPT; the order of the methods at 2:4; OWL at 70 %; 2:4 and 4 bits
in one sweep against one after the other. Ratios are of mean losses, with a 95 % bootstrap interval
over the windows, which are paired. A figure is met where the interval's far end meets it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from harness import environment, must, publish, run_child, table
from inputs import SEED, Inputs, peer_command
from losses import (
    Kept,
    asked_options,
    chosen_recipes,
    interval_text,
    loss_parser,
    lost,
    ratio_interval,
    seconds_text,
)

PEERS = {
    f"peer-{method}-{name}": (method, sparsity)
    for method in ("magnitude", "wanda", "sparsegpt")
    for name, sparsity in (("50", "0.5"), ("2of4", "2:4"))
    if (method, name) != ("magnitude", "2of4")  # the peer's own mask is of any weights
}


def peer(arguments: argparse.Namespace, name: str, inputs: Inputs) -> Path:
    """What llm-compressor makes of the very calibration windows of our recipes, written once."""
    method, sparsity = PEERS[name]
    output = arguments.scratch / name
    if not (output / "config.json").exists():
        tokens = inputs.tokens_file(arguments.samples, arguments.seq_len)
        more = ("--method", method, "--sparsity", sparsity)
        command = peer_command(
            arguments.peer_python, inputs, tokens, output, arguments.threads, *more
        )
        must(run_child(command), "llm-compressor")
    return output


def figures(found: dict[str, dict]) -> list[tuple[str, str, str]]:
    """What is asked, what came out, and whether the interval meets it."""
    rows: list[tuple[str, str, str]] = []

    def compare(text: str, one: str, other: str, least: float, most: float) -> None:
        if one not in found or other not in found:
            return
        ratio = ratio_interval(lost(found[one]), lost(found[other]))
        met = "met" if least <= ratio[1] and ratio[2] <= most else "missed"
        rows.append((text, interval_text(ratio, 3), met))

    for at in ("50", "2of4"):
        for method in ("magnitude", "wanda"):
            if at == "50":
                text = f"{method} at {at}, ours / peer's: 0.97 to 1.03"
                compare(text, f"{method}-{at}", f"peer-{method}-{at}", 0.97, 1.03)
        ours = [n for n in found if n.endswith(f"-{at}") and not n.startswith("peer-")]
        best = min(ours, key=lambda name: found[name]["loss"][0], default="")
        text = f"best at {at} ({best}) / peer's SparseGPT: at most 0.85"
        compare(text, best, f"peer-sparsegpt-{at}", 0.0, 0.85)
    compare("2:4: Wanda / magnitude: below 1", "wanda-2of4", "magnitude-2of4", 0.0, 1.0)
    compare("2:4: SparseGPT / Wanda: at most 1", "sparsegpt-2of4", "wanda-2of4", 0.0, 1.0)
    compare("70 %: OWL / uniform, Wanda: below 1", "wanda-owl-70", "wanda-70", 0.0, 1.0)
    compare("70 %: OWL / uniform, SparseGPT: below 1", "sparsegpt-owl-70", "sparsegpt-70", 0.0, 1.0)
    compare(
        "2:4 + 4 bits: joint / one after the other: below 1",
        "joint-2of4-w4", "sequential-2of4-w4", 0.0, 1.0,
    )  # fmt: skip
    return rows


def main() -> int:
    """Prints all losses and the figures; exit code 1 where one is missed."""
    parser = loss_parser(__doc__, "pruning")
    parser.add_argument("--peer-python", type=Path, help="of llm-compressor's environment")
    arguments = parser.parse_args()
    recipes = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    inputs = Inputs(arguments.original, arguments.calibration, arguments.test)
    jobs: dict[str, tuple[Any, Path | None]] = {
        name: (recipe, None) for name, recipe in chosen_recipes(recipes, arguments.only).items()
    }
    if arguments.peer_python is not None:
        jobs |= {name: (None, peer(arguments, name, inputs)) for name in PEERS}
    kept = Kept(arguments.scratch, asked_options(arguments))
    found: dict[str, dict] = {}
    for name, (recipe, artifact) in jobs.items():
        found[name] = kept.point(name, recipe, artifact)
        print(name, *found[name]["loss"], file=sys.stderr, flush=True)
    rows = [
        (name, interval_text(one["loss"]), f"{one['kl'][0]:.4f}", seconds_text(one))
        for name, one in found.items()
    ]
    asked = figures(found)
    first = next(iter(found.values()))
    shown = (
        f"{table(('recipe', 'loss over original (95 %)', 'KL', 's'), rows)}\n\n"
        f"{table(('figure', 'ratio (95 %)', ''), asked)}\n\n"
        f"Calibration {arguments.samples} x {arguments.seq_len} tokens of "
        f"{arguments.calibration.name}, seed {SEED}. {first['protocol']}"
    )
    result = {"environment": environment(arguments.threads), "found": found, "figures": asked}
    publish("Pruning beside llm-compressor", shown, result, arguments.record)
    return 1 if any(met == "missed" for _, _, met in asked) else 0


if __name__ == "__main__":
    sys.exit(main())
