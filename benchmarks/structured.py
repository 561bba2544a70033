"""Smaller models without training: how much is lost, and what is gained in prefill speed.

Depth: removing blocks by their influence against the mean of five random choices, at 10, 20 and
30 %. Width: FLAP, Minitron's sizes, LLM-Pruner's Taylor score and Wanda's at 20 % of the blocks'
weights. SliceGPT at 0 and 25 %, with one rotation and with one for each block. Every model is
measured as any other is: loss over the original by pocketlm's own evaluation; prefill in turns with
the original, so that what else runs on the machine slows both. A point that was measured before
with the same options is read from its file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import SCRATCH, environment, publish, table
from inputs import SEED, Inputs

RANDOMS = 5
DEPTHS = (0.1, 0.2, 0.3)
SLICED, APART = "slicegpt-25", "slicegpt-block-25"
PREFILL_FIGURE = 1.15
PROMPT, ROUNDS = 512, 9  # tokens of a prefill; turns


def points() -> dict[str, dict[str, Any]]:
    """Name → the recipe's step."""
    made: dict[str, dict[str, Any]] = {}
    for ratio in DEPTHS:
        made[f"influence-{ratio:.0%}"] = {"method": "depth", "ratio": ratio}
        for seed in range(RANDOMS):
            step = {"method": "depth", "ratio": ratio, "score": "random", "seed": seed}
            made[f"random{seed}-{ratio:.0%}"] = step
    for score in ("perplexity", "taylor"):
        made[f"{score}-20%"] = {"method": "depth", "ratio": 0.2, "score": score}
    made["laco-20%"] = {"method": "laco", "ratio": 0.2}
    for method in ("flap", "minitron", "llm_pruner", "wanda_sp"):
        made[f"{method}-20%"] = {"method": method, "ratio": 0.2}
    made["slicegpt-0"] = {"method": "slicegpt", "ratio": 0.0}
    made[SLICED] = {"method": "slicegpt", "ratio": 0.25}  # the same 432 columns as 20 %: 9 heads
    made[APART] = {"method": "slicegpt", "ratio": 0.25, "rotation": "block"}
    return made


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--test", type=Path, default=Inputs.test)
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "structured")
    parser.add_argument("--only", nargs="*", default=None, help="names of points, or their starts")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=60, help="of the test text")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def measured(name: str, step: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One point, from its file where it was measured before."""
    options = {k: str(v) for k, v in vars(arguments).items() if k not in ("only", "record")}
    file = arguments.scratch / f"{name}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["options"] == options:
            return kept["found"]
    import pocketlm

    output = arguments.scratch / name
    started = time.perf_counter()
    result = pocketlm.compress(
        arguments.original, {"steps": [step]}, output, resume=False, seed=SEED,
        calibration=str(arguments.calibration), samples=arguments.samples,
        seq_len=arguments.seq_len, device=arguments.device, threads=arguments.threads,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    found = evaluated(output, arguments)
    ledger = json.loads((output / "pocketlm" / "ledger.json").read_text(encoding="utf-8"))
    found |= {
        "seconds": seconds, "bytes": result.output_bytes, "summary": ledger["stages"][0]["summary"],
    }  # fmt: skip
    shutil.rmtree(output)
    file.write_text(json.dumps({"options": options, "found": found}), encoding="utf-8")
    print(f"{name}: {found['loss'][0]:.4f}, {found['summary']}", file=sys.stderr, flush=True)
    return found


def evaluated(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss over the original, KL and prefill speed of both."""
    import pocketlm

    report = pocketlm.evaluate(
        model, arguments.original, text=str(arguments.test), limit=arguments.windows,
        seq_len=arguments.window, speed=False, device=arguments.device,
        threads=arguments.threads,
    )  # fmt: skip
    divergence = report.quality.divergence
    assert divergence is not None
    loss = divergence.loss_over_original
    return {
        "loss": [loss.value, loss.low, loss.high],
        "kl": divergence.kl_mean.value,
        "prefill": None if arguments.no_speed else prefill_gain(model, arguments),
    }


def prefill_gain(model: Path, arguments: argparse.Namespace) -> float:
    """How many times as fast as the original a model reads a prompt: the median of all turns."""
    import torch

    import pocketlm

    torch.set_num_threads(arguments.threads)
    models = [
        pocketlm.load(path, device=arguments.device)[0].eval()
        for path in (arguments.original, model)
    ]
    prompt_1T = torch.arange(PROMPT, device=arguments.device)[None]
    ratios = []
    for _ in range(ROUNDS + 1):  # the first warms up
        seconds = []
        for one in models:
            started = time.perf_counter()
            with torch.inference_mode():
                float(one(prompt_1T, logits_to_keep=1).logits[0, 0, 0])
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def verdicts(found: dict[str, dict[str, Any]]) -> list[str]:
    """The figures that the points at hand can say something of."""
    lines = []
    for ratio in DEPTHS:
        randoms = [found.get(f"random{seed}-{ratio:.0%}") for seed in range(RANDOMS)]
        known = [one["loss"][0] for one in randoms if one is not None]
        best = found.get(f"influence-{ratio:.0%}")
        if best is not None and len(known) == RANDOMS:
            mean = sum(known) / RANDOMS
            said = "met" if best["loss"][2] < mean else "missed"
            lines.append(
                f"depth {ratio:.0%}: influence {best['loss'][0]:.3f}, mean of {RANDOMS} random "
                f"{mean:.3f} ({min(known):.3f} to {max(known):.3f}): {said}."
            )
    wanda = found.get("wanda_sp-20%")
    for name in ("flap-20%", "minitron-20%"):
        if wanda is not None and name in found:
            said = "met" if found[name]["loss"][0] < wanda["loss"][0] else "missed"
            lines.append(f"{name} below Wanda for units ({wanda['loss'][0]:.3f}): {said}.")
    if "slicegpt-0" in found:
        loss = abs(found["slicegpt-0"]["loss"][0])
        lines.append(
            f"SliceGPT at 0 %: {loss:.1e} from the original: {'met' if loss < 1e-4 else 'missed'}."
        )
    sliced = found.get(SLICED)
    if sliced is not None and sliced["prefill"] is not None:
        said = "met" if sliced["prefill"] > PREFILL_FIGURE else "missed"
        lines.append(
            f"SliceGPT at 25 %: prefill × {sliced['prefill']:.2f}, figure {PREFILL_FIGURE}: {said}."
        )
    apart = found.get(APART)
    if sliced is not None and apart is not None:
        lines.append(
            f"SliceGPT at 25 %: {apart['loss'][0]:.3f} with a rotation for each block, "
            f"{sliced['loss'][0]:.3f} with one for all; {apart['bytes'] / sliced['bytes']:.3f} "
            "times the bytes."
        )
    return lines


def main() -> int:
    """Prints the table; exit code 1 where a figure is missed."""
    arguments = parse()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name, step in points().items():
        if arguments.only is None or name.startswith(tuple(arguments.only)):
            found[name] = measured(name, step, arguments)
    rows = [
        (
            name, one["summary"], "{:.4f} ({:.4f}-{:.4f})".format(*one["loss"]),
            f"{one['kl']:.4f}", f"{one['bytes'] / 1e6:.0f} MB",
            "–" if one["prefill"] is None else f"× {one['prefill']:.2f}", f"{one['seconds']:.0f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    header = ("model", "what", "loss over original (95 %)", "KL", "size", "prefill", "seconds")
    said = verdicts(found)
    shown = f"{table(header, rows)}\n\n" + "\n".join(said)
    result = {"environment": environment(arguments.threads), "points": found}
    publish("Smaller models without training", shown, result, arguments.record)
    return 1 if any("missed" in line for line in said) else 0


if __name__ == "__main__":
    sys.exit(main())
