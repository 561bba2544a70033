"""Do bits gain from being put where they matter? Allocated against uniform at equal real bits.

Both sides run the same steps on the same calibration windows, symmetric grids in groups of 64. The
uniform side has one grid where one exists (3.25 is W3, 4.25 is W4); between two grids, at 2.75 and
3.75, blocks take turns: even ones the higher bits, odd ones the lower. The allocated side gets the
uniform side's real bits as its budget, never more. Figure: the loss over the original is smaller at
every point, the paired interval of the ratio clear of one.

Each point is kept once it is made or measured: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, SCRATCH, environment, publish, table
from inputs import SAMPLES, SEED, SEQ_LEN, Inputs
from losses import ratio_interval
from plots import Series, line_chart

GROUP = 64
SCALE_BITS = 16 / GROUP
POINTS = (2.75, 3.25, 3.75, 4.25)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--bits", type=float, nargs="*", default=list(POINTS))
    parser.add_argument("--method", default="gptq", help="as `pocketlm compress --method`")
    parser.add_argument("--target", default="transformers", help="vllm: fused layers are one unit")
    parser.add_argument("--search-minutes", type=float, default=30.0)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "allocation")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "allocation.svg")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def uniform_recipe(bits: float, method: str, blocks: list[str]) -> Any:
    """The recipe that looks at nothing: one grid, or two in turns."""
    import pocketlm.api
    from pocketlm.core.spec import QuantSpec

    lower, halves = divmod(round(2 * (bits - SCALE_BITS)), 2)
    if abs(lower + halves / 2 + SCALE_BITS - bits) > 1e-9:
        raise SystemExit(f"{bits} is no multiple of a half above the scales' {SCALE_BITS}")
    recipe = pocketlm.api.build_recipe(method=method, bits=lower, group_size=GROUP)
    if not halves:
        return recipe
    higher = QuantSpec(bits=lower + 1, group_size=GROUP)
    return recipe.model_copy(update={"overrides": {f"{path}.*": higher for path in blocks[::2]}})


def make(arguments: argparse.Namespace, inputs: Inputs) -> dict[str, Path]:
    """Every artifact by name, made where it is not there yet."""
    import pocketlm
    from pocketlm.models import open_model

    blocks = list(open_model(inputs.original).block_paths)
    settings = {
        "calibration": str(inputs.calibration), "samples": SAMPLES, "seq_len": SEQ_LEN,
        "seed": SEED, "device": arguments.device, "threads": arguments.threads,
        "target": arguments.target,
    }  # fmt: skip
    search = {
        "search_dir": arguments.scratch / "findings", "search_minutes": arguments.search_minutes
    }  # fmt: skip
    artifacts: dict[str, Path] = {}
    for bits in arguments.bits:
        real_bits = bits  # what the uniform side comes to, once it is made
        for kind in ("uniform", "allocated"):
            name = f"{kind}-{bits:g}"
            output = artifacts[name] = arguments.scratch / arguments.target / name
            recipe = uniform_recipe(bits, arguments.method, blocks)
            budget: dict[str, Any] = {}
            if kind == "allocated":  # the same steps
                recipe = recipe.model_copy(update={"overrides": {}})
                budget = {"bits": real_bits, **search}
            made = pocketlm.compress(str(inputs.original), recipe, output, **settings, **budget)
            real_bits = made.bits_per_weight
            state = "there" if made.already_done else f"{sum(made.seconds.values()):.0f} s"
            print(f"{name}: {made.bits_per_weight:.4f} bits, {state}", file=sys.stderr)
    return artifacts


def measure(
    arguments: argparse.Namespace, inputs: Inputs, artifacts: dict[str, Path]
) -> dict[str, dict[str, Any]]:
    """The quality of each artifact, measured where it is not kept yet."""
    import torch

    from pocketlm.calibration.texts import load_text
    from pocketlm.calibration.windows import eval_windows
    from pocketlm.engine.compress import finished_ledger
    from pocketlm.evaluate.quality import evaluate_model, score_original
    from pocketlm.models import open_model

    def load(path: Path) -> Any:
        return open_model(
            path, device=arguments.device, compute_dtype=torch.float32, allow_compressed=True
        )

    original = load(inputs.original)
    text = load_text(inputs.test, part="evaluation")
    windows = eval_windows(
        original.tokenizer(), text, arguments.seq_len, arguments.windows, original.context
    )
    base = None
    found: dict[str, dict[str, Any]] = {}
    for name, path in artifacts.items():
        ledger = finished_ledger(path)
        assert ledger is not None
        key = [windows.sha256, ledger.files, arguments.device]
        kept = path.with_name(f"{name}.json")
        if kept.exists():
            record = json.loads(kept.read_text("utf-8"))
            if record["key"] == key:
                found[name] = record
                continue
        base = base or score_original(original, windows)
        report = evaluate_model(load(path), windows, base)
        print(f"{name}: measured in {report.seconds:.0f} s", file=sys.stderr)
        record = {
            "key": key,
            "bits_per_weight": ledger.bits_per_weight(),
            "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
            "quality": report.model_dump(mode="json"),
            "protocol": report.protocol.sentence(),
        }
        record["quality"]["divergence"]["worst_tokens"] = []
        kept.write_text(json.dumps(record), "utf-8")
        found[name] = record
    if base is not None:
        base.close()
    return found


def lost(record: dict[str, Any]) -> list[float]:
    """Loss over the original of each window."""
    quality = record["quality"]
    pairs = zip(
        quality["window_losses"], quality["divergence"]["original_window_losses"], strict=True
    )
    return [model - original for model, original in pairs]


def interval(value: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def main() -> int:
    """Prints the table and draws the plot; exit code 1 where a point is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    arguments.bits.sort()
    records = measure(arguments, inputs, make(arguments, inputs))
    rows: list[tuple[str, ...]] = []
    ratios: dict[float, tuple[float, float, float]] = {}
    for bits in arguments.bits:
        for kind in ("uniform", "allocated"):
            record = records[f"{kind}-{bits:g}"]
            divergence = record["quality"]["divergence"]
            rows.append(
                (f"{bits:g}", kind, f"{record['bits_per_weight']:.4f}", f"{record['bytes']:,}",
                 interval(divergence["loss_over_original"]), interval(divergence["kl_mean"]),
                 f"{divergence['top1_agreement']['value']:.4f}")
            )  # fmt: skip
        ratios[bits] = ratio_interval(
            lost(records[f"allocated-{bits:g}"]), lost(records[f"uniform-{bits:g}"])
        )
    met = all(high < 1 for _, _, high in ratios.values())
    lines = [
        f"at {bits:g} bits: {value:.3f} ({low:.3f}-{high:.3f})"
        for bits, (value, low, high) in ratios.items()
    ]
    header = ("budget", "", "real bits", "weight files", "loss over original (95 %)", "KL (95 %)",
              "top-1")  # fmt: skip
    protocol = next(iter(records.values()))["protocol"]
    shown = (
        f"{table(header, rows)}\n\nRatio of the losses over the original, allocated to uniform: "
        f"{'; '.join(lines)}. Figure: below 1 everywhere at the upper end: "
        f"{'met' if met else 'missed'}.\nUniform at 2.75 and 3.75: blocks take turns between the "
        f"two neighbouring grids. Steps: {arguments.method}; target {arguments.target}; device "
        f"{arguments.device}.\n{protocol}"
    )
    result = {
        "environment": environment(arguments.threads), "ratios": ratios, "met": met,
        "points": records, "device": arguments.device, "target": arguments.target,
    }  # fmt: skip
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    arguments.plot.write_text(plot(arguments.bits, records), "utf-8")
    publish("bits where they matter, against uniform", shown, result, arguments.record)
    return 0 if met else 1


def plot(budgets: list[float], records: dict[str, dict[str, Any]]) -> str:
    """Loss over the original against real bits, both sides."""
    series = []
    for kind in ("uniform", "allocated"):
        points = []
        for bits in budgets:
            record = records[f"{kind}-{bits:g}"]
            loss = record["quality"]["divergence"]["loss_over_original"]
            points.append((bits, loss["value"], loss["low"], loss["high"]))
        series.append(Series(kind, points))
    return line_chart(
        "Bits where they matter", "real bits per weight of the linears",
        "loss over the original, nats a token", series,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
