"""How much is lost where inputs are rounded too: ours beside llm-compressor's.

Two pairs, each artifact measured against the original by our evaluator on the same windows, with
the rounding of inputs that its config.json asks for in effect: W8A8 against SmoothQuant + GPTQ, and
FP8 with dynamic inputs against FP8_DYNAMIC. Figures: a ratio of the losses over the original of at
most 0.75 and of at most 1. Every point is kept in a file of its own; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness import environment, must, publish, run_child, table
from inputs import Inputs, peer_command
from losses import (
    Kept,
    asked_options,
    chosen_recipes,
    interval_text,
    loss_parser,
    lost,
    ratio_interval,
)

# scheme of ours → the peer's method and scheme, and what the ratio may be
PAIRS = {"w8a8": ("smoothquant", "W8A8", 0.75), "fp8_dynamic": ("rtn", "FP8_DYNAMIC", 1.0)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = loss_parser(__doc__, "w8a8")
    parser.add_argument("--peer-python", type=Path, required=True, help="the peer's interpreter")
    return parser.parse_args()


def peer_artifact(arguments: argparse.Namespace, inputs: Inputs, scheme: str) -> tuple[Path, float]:
    """The peer's artifact and the seconds it took, made where it is missing."""
    method, preset, _ = PAIRS[scheme]
    output = arguments.scratch / f"llm-compressor-{scheme}"
    record = output.with_suffix(".json")
    if not record.exists():
        tokens = inputs.tokens_file(arguments.samples, arguments.seq_len)
        more = ("--method", method, "--scheme", preset)
        command = peer_command(
            arguments.peer_python, inputs, tokens, output, arguments.threads, *more
        )
        made = must(run_child(command), "llm-compressor").last_json()
        record.write_text(json.dumps(made), encoding="utf-8")
    return output, json.loads(record.read_text(encoding="utf-8"))["compress_seconds"]


def main() -> int:
    """Prints the table; exit code 1 where a figure is missed."""
    arguments = parse()
    inputs = Inputs(arguments.original, arguments.calibration, arguments.test)
    inputs.check()
    kept = Kept(arguments.scratch, asked_options(arguments))
    rows, ratios, result = [], [], {"environment": environment(arguments.threads), "points": {}}
    missed = False
    for scheme in chosen_recipes(PAIRS, arguments.only):
        ours = kept.point(f"ours-{scheme}", scheme)
        artifact, seconds = peer_artifact(arguments, inputs, scheme)
        peer = kept.point(f"peer-{scheme}", None, artifact)
        for who, found, took in (
            ("pocketlm", ours, ours["seconds"]),
            ("llm-compressor", peer, seconds),
        ):
            kl = f"{found['kl'][0]:.4f}"
            rows.append((f"{who} {scheme}", interval_text(found["loss"]), kl, f"{took:.0f}"))
            result["points"][f"{who} {scheme}"] = found
        ratio = ratio_interval(lost(ours), lost(peer))
        figure = PAIRS[scheme][2]
        said = "met" if ratio[2] <= figure else "missed"
        missed |= said == "missed"
        ratios.append(f"{scheme}: ratio {interval_text(ratio, 3)}, at most {figure}: {said}.")
    header = ("model", "loss over original (95 %)", "KL", "seconds")
    protocol = next(iter(result["points"].values()))["protocol"]
    shown = f"{table(header, rows)}\n\n" + "\n".join([*ratios, protocol])
    publish("Rounded inputs: W8A8 and FP8, loss over the original", shown, result, arguments.record)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
