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
from typing import Any

from harness import SCRATCH, environment, must, publish, run_child, table
from inputs import SAMPLES, SEQ_LEN, Inputs, peer_command
from methods import measure
from quality_w4 import ratio_interval

# scheme of ours → the peer's method and scheme, and what the ratio may be
PAIRS = {"w8a8": ("smoothquant", "W8A8", 0.75), "fp8_dynamic": ("rtn", "FP8_DYNAMIC", 1.0)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--peer-python", type=Path, required=True, help="the peer's interpreter")
    parser.add_argument("--only", nargs="*", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of ours; the peer takes all")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "w8a8")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def peer_artifact(arguments: argparse.Namespace, inputs: Inputs, scheme: str) -> tuple[Path, float]:
    """The peer's artifact and the seconds it took, made where it is missing."""
    method, preset, _ = PAIRS[scheme]
    output = arguments.scratch / f"llm-compressor-{scheme}"
    record = output.with_suffix(".json")
    if not record.exists():
        more = ("--method", method, "--scheme", preset)
        command = peer_command(
            arguments.peer_python, inputs, inputs.tokens_file(), output, arguments.threads, *more
        )
        made = must(run_child(command), "llm-compressor").last_json()
        record.write_text(json.dumps(made), encoding="utf-8")
    return output, json.loads(record.read_text(encoding="utf-8"))["compress_seconds"]


def point(
    arguments: argparse.Namespace, inputs: Inputs, name: str, recipe: Any, artifact: Path | None
) -> dict[str, Any]:
    """One measured artifact, from its file where it was measured before."""
    options = {
        "original": str(inputs.original), "calibration": str(inputs.calibration),
        "test": str(inputs.test), "samples": arguments.samples, "seq_len": SEQ_LEN,
        "windows": arguments.windows, "window": arguments.window, "device": arguments.device,
        "threads": arguments.threads, "scratch": str(arguments.scratch),
    }  # fmt: skip
    file = arguments.scratch / f"{name}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["options"] == options:
            return kept["found"]
    found = measure(name, recipe, artifact, options)
    file.write_text(json.dumps({"options": options, "found": found}), encoding="utf-8")
    return found


def lost(found: dict[str, Any]) -> list[float]:
    """Loss over the original, window by window."""
    pairs = zip(found["window_losses"], found["original_window_losses"], strict=True)
    return [model - original for model, original in pairs]


def main() -> int:
    """Prints the table; exit code 1 where a figure is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows, ratios, result = [], [], {"environment": environment(arguments.threads), "points": {}}
    missed = False
    for scheme in arguments.only:
        ours = point(arguments, inputs, f"ours-{scheme}", scheme, None)
        artifact, seconds = peer_artifact(arguments, inputs, scheme)
        peer = point(arguments, inputs, f"peer-{scheme}", None, artifact)
        for who, found, took in (
            ("pocketlm", ours, ours["seconds"]),
            ("llm-compressor", peer, seconds),
        ):
            (loss, low, high), kl = found["loss"], found["kl"][0]
            shown = f"{loss:.4f} ({low:.4f}-{high:.4f})"
            rows.append((f"{who} {scheme}", shown, f"{kl:.4f}", f"{took:.0f}"))
            result["points"][f"{who} {scheme}"] = found
        value, low, high = ratio_interval(lost(ours), lost(peer))
        figure = PAIRS[scheme][2]
        missed |= high > figure
        said = "met" if high <= figure else "missed"
        interval = f"{value:.3f} ({low:.3f}-{high:.3f})"
        ratios.append(f"{scheme}: ratio {interval}, at most {figure}: {said}.")
    header = ("model", "loss over original (95 %)", "KL", "seconds")
    protocol = next(iter(result["points"].values()))["protocol"]
    shown = f"{table(header, rows)}\n\n" + "\n".join([*ratios, protocol])
    publish("Rounded inputs: W8A8 and FP8, loss over the original", shown, result, arguments.record)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
