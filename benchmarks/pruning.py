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
import json
import subprocess
import sys
from pathlib import Path

import numpy
import yaml
from harness import SCRATCH, environment, publish, table
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs
from methods import measure

PEERS = {
    f"peer-{method}-{name}": (method, sparsity)
    for method in ("magnitude", "wanda", "sparsegpt")
    for name, sparsity in (("50", "0.5"), ("2of4", "2:4"))
    if (method, name) != ("magnitude", "2of4")  # the peer's own mask is of any weights
}
DRAWS = 10_000


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", type=Path, help="of llm-compressor's environment")
    parser.add_argument("--only", nargs="*", help="names of recipes; default: all")
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--test", type=Path, default=Inputs.test)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="of calibration")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "pruning")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def ratio(one: dict, other: dict) -> tuple[float, float, float]:
    """The ratio of two mean losses over the original, and its 95 % bootstrap interval."""
    losses = [
        numpy.array(found["window_losses"]) - numpy.array(found["original_window_losses"])
        for found in (one, other)
    ]
    picks = numpy.random.default_rng(0).integers(len(losses[0]), size=(DRAWS, len(losses[0])))
    drawn = losses[0][picks].mean(1) / losses[1][picks].mean(1)
    low, high = numpy.quantile(drawn, (0.025, 0.975))
    return float(losses[0].mean() / losses[1].mean()), float(low), float(high)


def peer(arguments: argparse.Namespace, name: str, tokens: Path) -> Path:
    """What llm-compressor makes, written once."""
    method, sparsity = PEERS[name]
    output = arguments.scratch / name
    if not (output / "config.json").exists():
        script = Path(__file__).with_name("peers") / "llmcompressor_run.py"
        command = [
            arguments.peer_python, script, arguments.original, output, "--method", method,
            "--sparsity", sparsity, "--tokens", tokens, "--overwrite",
            "--threads", arguments.threads,
        ]  # fmt: skip
        subprocess.run([str(part) for part in command], check=True)
    return output


def tokens_file(arguments: argparse.Namespace) -> Path:
    """The very calibration windows that our recipes get, for the peer."""
    from pocketlm.calibration.texts import load_text
    from pocketlm.calibration.windows import token_windows
    from pocketlm.models import open_model

    model = open_model(arguments.original)
    tokenizer = model.tokenizer()
    text = load_text(str(arguments.calibration), "calibration", tokenizer)
    windows = token_windows(
        tokenizer, text, arguments.samples, arguments.seq_len, SEED, model.context
    )
    path = arguments.scratch / "tokens.npy"
    numpy.save(path, windows.tokens_NT.numpy())
    return path


def figures(found: dict[str, dict]) -> list[tuple[str, str, str]]:
    """What is asked, what came out, and whether the interval meets it."""
    rows: list[tuple[str, str, str]] = []

    def compare(text: str, one: str, other: str, least: float, most: float) -> None:
        if one not in found or other not in found:
            return
        value, low, high = ratio(found[one], found[other])
        met = "met" if least <= low and high <= most else "missed"
        rows.append((text, f"{value:.3f} ({low:.3f}-{high:.3f})", met))

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
    arguments = parse()
    recipes = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    keys = (
        "original", "calibration", "test", "samples", "seq_len", "windows", "window", "device",
        "threads", "scratch",
    )  # fmt: skip
    options = {key: value for key, value in vars(arguments).items() if key in keys}
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    jobs: dict[str, tuple[object, Path | None]] = {
        name: (recipes[name], None) for name in (arguments.only or recipes)
    }
    if arguments.peer_python is not None:
        tokens = tokens_file(arguments)
        jobs |= {name: (None, peer(arguments, name, tokens)) for name in PEERS}
    found: dict[str, dict] = {}
    for name, (recipe, artifact) in jobs.items():
        kept = arguments.scratch / f"{name}.json"
        asked = [recipe, options]
        if kept.exists() and json.loads(kept.read_text("utf-8"))["asked"] == asked:
            found[name] = json.loads(kept.read_text("utf-8"))["found"]
            continue
        found[name] = measure(name, recipe, artifact, options)
        kept.write_text(json.dumps({"asked": asked, "found": found[name]}), encoding="utf-8")
        print(name, *found[name]["loss"], file=sys.stderr, flush=True)
    rows = [
        (name, f"{one['loss'][0]:.4f} ({one['loss'][1]:.4f}-{one['loss'][2]:.4f})",
         f"{one['kl'][0]:.4f}", "–" if one["seconds"] is None else f"{one['seconds']:.0f}")
        for name, one in found.items()
    ]  # fmt: skip
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
