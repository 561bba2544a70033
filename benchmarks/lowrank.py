"""Low rank: which factors lose least at equal parameters, and does a repair pay at equal bits?

The recipes of lowrank.yaml, calibrated on the same tokens and measured on the same windows as
`methods.py` does it. Figures, each with the paired interval of the ratio of losses below one:
SVD-LLM below ASVD below SVD at a fifth of the parameters removed; at about 3.5 real bits, LQER
after RTN below RTN with narrower groups. After GPTQ it is shown, and no figure.
"""

from __future__ import annotations

import sys
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
    lost,
    ratio_interval,
    seconds_text,
)

FIGURES = (("svd-llm", "asvd"), ("asvd", "svd"), ("rtn-3-lqer", "rtn-3-g32"))


def main() -> int:
    """Prints the table and the figures; 1 where one is missed."""
    arguments = loss_parser(__doc__, "lowrank").parse_args()
    recipes = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    kept = Kept(arguments.scratch, asked_options(arguments))
    found: dict[str, dict[str, Any]] = {}
    for name, recipe in chosen_recipes(recipes, arguments.only).items():
        found[name] = kept.point(name, recipe)
        print(f"{name}: loss {found[name]['loss'][0]:.4f}", file=sys.stderr, flush=True)
    rows = [
        (
            name, f"{one['bits']:.3f}",
            interval_text(one["loss"]),
            f"{one['kl'][0]:.4f}", f"{one['perplexity']:.3f}", seconds_text(one),
        )
        for name, one in found.items()
    ]  # fmt: skip
    header = ("recipe", "bits", "loss over original (95 %)", "KL", "perplexity", "s")
    figures, met = [], True
    for less, more in FIGURES:
        if less not in found or more not in found:
            continue
        ratio = ratio_interval(lost(found[less]), lost(found[more]))
        fair = found[less]["bits"] <= found[more]["bits"] + 0.01
        good = ratio[2] < 1 and fair
        met &= good
        at = "" if fair else ", but at more bits"
        figures.append(
            f"{less} / {more}: {interval_text(ratio, 3)}{at}: {'met' if good else 'missed'}"
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
