"""Low rank: which factors lose least at equal parameters, and does a repair pay at equal bits?

The recipes of lowrank.yaml, calibrated on the same tokens and measured on the same windows as
`methods.py` does it. Figures, each with the paired interval of the ratio of losses below one:
SVD-LLM below ASVD below SVD at a fifth of the parameters removed; at about 3.5 real bits, LQER
after RTN below RTN with narrower groups. After GPTQ it is shown, and no figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from harness import SCRATCH, environment, publish, table
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs
from methods import measure
from quality_w4 import ratio_interval

FIGURES = (("svd-llm", "asvd"), ("asvd", "svd"), ("rtn-3-lqer", "rtn-3-g32"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--recipes", type=Path, default=Path(__file__).with_name("lowrank.yaml"),
        help="YAML: name → recipe",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", help="names to run; default: all")
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--calibration", type=Path, default=Inputs.calibration)
    parser.add_argument("--test", type=Path, default=Inputs.test)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="of calibration")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "lowrank")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def lost(one: dict[str, Any]) -> list[float]:
    """Loss over the original of each window."""
    pairs = zip(one["window_losses"], one["original_window_losses"], strict=True)
    return [ours - original for ours, original in pairs]


def main() -> int:
    """Prints the table and the figures; 1 where one is missed."""
    arguments = parse()
    recipes: dict[str, Any] = yaml.safe_load(arguments.recipes.read_text(encoding="utf-8"))
    chosen = arguments.only or list(recipes)
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("recipes", "only", "record")
    }
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:
        kept = arguments.scratch / f"{name}.json"
        asked = json.dumps([recipes[name], options], sort_keys=True)
        if kept.exists() and (known := json.loads(kept.read_text("utf-8")))["asked"] == asked:
            found[name] = known["found"]
            continue
        found[name] = measure(name, recipes[name], None, options)
        kept.write_text(json.dumps({"asked": asked, "found": found[name]}), "utf-8")
        print(f"{name}: loss {found[name]['loss'][0]:.4f}", file=sys.stderr, flush=True)
    rows = [
        (
            name, f"{one['bits']:.3f}",
            f"{one['loss'][0]:.4f} ({one['loss'][1]:.4f}-{one['loss'][2]:.4f})",
            f"{one['kl'][0]:.4f}", f"{one['perplexity']:.3f}", f"{one['seconds']:.0f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    header = ("recipe", "bits", "loss over original (95 %)", "KL", "perplexity", "s")
    figures, met = [], True
    for less, more in FIGURES:
        if less not in found or more not in found:
            continue
        ratio, low, high = ratio_interval(lost(found[less]), lost(found[more]))
        fair = found[less]["bits"] <= found[more]["bits"] + 0.01
        good = high < 1 and fair
        met &= good
        at = "" if fair else ", but at more bits"
        figures.append(
            f"{less} / {more}: {ratio:.3f} ({low:.3f}-{high:.3f}){at}: "
            f"{'met' if good else 'missed'}"
        )
    first = next(iter(found.values()))
    shown = (
        f"{table(header, rows)}\n\n" + "\n".join(figures) + f"\n\nCalibration "
        f"{arguments.samples} x {arguments.seq_len} tokens of {arguments.calibration.name}, "
        f"seed {SEED}.\n{first['protocol']}"
    )
    result = {"environment": environment(arguments.threads), "figures": figures, "found": found}
    publish("Low rank", shown, result, arguments.record)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
