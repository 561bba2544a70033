"""What does each method lose, at how many real bits, in how many seconds?

Every recipe of a YAML file (name → recipe) compresses the benchmark's original with the same
calibration tokens; each artifact is measured against the original on the same windows. Results are
kept one file a recipe: a run that was stopped goes on, and a recipe that changed is run again.
Artifacts of other tools join with --more and are measured alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from harness import SCRATCH, environment, publish, table
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--recipes", type=Path, default=Path(__file__).with_name("methods.yaml"),
        help="YAML: name → recipe",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", help="names to run; default: all")
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--test", type=Path, default=Inputs.test)
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="artifacts of other tools")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="of calibration")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="recipes at once; their seconds suffer")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "methods")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


_bases: dict[str, Any] = {}  # test text → the original on it


def measure(name: str, recipe: Any, artifact: Path | None, options: dict[str, Any]) -> dict:
    """One recipe, or one artifact, compressed and measured; runs in a process of its own."""
    import torch

    from pocketlm import api
    from pocketlm.calibration.texts import load_text
    from pocketlm.calibration.windows import eval_windows
    from pocketlm.evaluate.quality import evaluate_model, score_original
    from pocketlm.models import open_model

    torch.set_num_threads(options["threads"])
    seconds, output = None, artifact
    bits = size = None
    if output is None:
        output = Path(options["scratch"]) / name
        started = time.monotonic()
        made = api.compress(
            options["original"], recipe=recipe, output=output, samples=options["samples"],
            seq_len=options["seq_len"], calibration=options["calibration"], seed=SEED,
            device=options["device"], threads=options["threads"], resume=False,
        )  # fmt: skip
        seconds, bits = time.monotonic() - started, made.bits_per_weight
        size = made.output_bytes
    like = {"device": options["device"], "compute_dtype": torch.float32}
    if options["test"] not in _bases:
        original = open_model(options["original"], **like)
        text = load_text(options["test"], part="evaluation")
        windows = eval_windows(
            original.tokenizer(), text, options["window"], options["windows"], original.context
        )
        _bases[options["test"]] = score_original(original, windows)
    base = _bases[options["test"]]
    report = evaluate_model(open_model(output, allow_compressed=True, **like), base.windows, base)
    if artifact is None:
        shutil.rmtree(output)
    divergence = report.divergence
    assert divergence is not None
    loss, kl = divergence.loss_over_original, divergence.kl_mean
    return {
        "name": name, "bits": bits, "bytes": size, "seconds": seconds,
        "loss": [loss.value, loss.low, loss.high], "kl": [kl.value, kl.low, kl.high],
        "top1": divergence.top1_agreement.value, "perplexity": report.perplexity,
        "original_perplexity": divergence.original_perplexity,
        "window_losses": list(report.window_losses),
        "original_window_losses": list(divergence.original_window_losses),
        "protocol": report.protocol.sentence(),
    }  # fmt: skip


def main() -> int:
    """Prints the table of all recipes."""
    arguments = parse()
    recipes: dict[str, Any] = yaml.safe_load(arguments.recipes.read_text(encoding="utf-8"))
    unknown = set(arguments.only or ()) - set(recipes)
    if unknown:
        raise SystemExit(f"no recipe named {', '.join(sorted(unknown))} in {arguments.recipes}")
    chosen = {name: recipes[name] for name in (arguments.only or recipes)}
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key in ("original", "calibration", "test", "samples", "seq_len", "windows", "window",
                   "device", "threads", "scratch")
    }  # fmt: skip
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    jobs = [(name, recipe, None) for name, recipe in chosen.items()]
    jobs += [(path.name, None, path) for path in arguments.more]
    found: dict[str, dict] = {}
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        waiting = {}
        for name, recipe, artifact in jobs:
            asked = json.dumps([recipe, str(artifact), options], sort_keys=True)
            file = (
                arguments.scratch / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
            )
            if file.exists():
                found[name] = json.loads(file.read_text(encoding="utf-8"))
            else:
                waiting[name] = (file, pool.submit(measure, name, recipe, artifact, options))
        for name, (file, future) in waiting.items():
            try:
                found[name] = future.result()
            except Exception as error:  # one recipe that fails must not take the others along
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            file.write_text(json.dumps(found[name]), encoding="utf-8")
            one = found[name]
            print(f"{name}: loss {one['loss'][0]:.4f} kl {one['kl'][0]:.4f}", flush=True)
    rows = [
        (
            one["name"],
            "–" if one["bits"] is None else f"{one['bits']:.3f}",
            f"{one['loss'][0]:.4f} ({one['loss'][1]:.4f}-{one['loss'][2]:.4f})",
            f"{one['kl'][0]:.4f}", f"{one['top1']:.4f}", f"{one['perplexity']:.3f}",
            "–" if one["seconds"] is None else f"{one['seconds']:.0f}",
        )
        for name, _, _ in jobs if name in found
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
