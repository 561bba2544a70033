"""How much is lost at W4A16 symmetric g64: ours beside llm-compressor's GPTQ.

One process evaluates the original, our artifact and the peer's with the same code on the same
windows of WikiText-2 test. Figure: our loss over the original at most 0.8 times the peer's. The
ratio's interval resamples windows, the same ones for both (paired).

Artifacts are given, or made here by both tools from the same calibration tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import SCRATCH, environment, must, pocketlm, publish, run_child, table
from inputs import Inputs, peer_command
from losses import ratio_interval, score

FIGURE = 0.8


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, default=Inputs.original)
    parser.add_argument("--ours", type=Path, help="our artifact; made when not given")
    parser.add_argument("--peer", type=Path, help="the peer's artifact; made when not given")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="further artifacts")
    parser.add_argument("--peer-python", type=Path, help="interpreter of the peer's environment")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def make(arguments: argparse.Namespace, inputs: Inputs) -> tuple[Path, Path]:
    """Our artifact and the peer's, made here where they were not given."""
    ours, peer = arguments.ours, arguments.peer
    if ours is None:
        ours = SCRATCH / "ours-w4g64"
        command = pocketlm(*inputs.compress_arguments(ours, arguments.threads))
        must(run_child(command), "pocketlm compress")
    if peer is None:
        if arguments.peer_python is None:
            raise SystemExit("give --peer, or --peer-python to make it")
        peer = SCRATCH / "peer-w4g64"
        tokens = inputs.tokens_file()
        command = peer_command(arguments.peer_python, inputs, tokens, peer, arguments.threads)
        must(run_child(command), "llm-compressor")
    return ours, peer


def main() -> int:
    """Prints the table; exit code 1 where the figure is missed."""
    arguments = parse()
    inputs = Inputs(original=arguments.original)
    inputs.check()
    ours, peer = make(arguments, inputs)

    import torch

    from pocketlm.evaluate.quality import evaluate_model
    from pocketlm.models import open_model

    torch.set_num_threads(arguments.threads)
    base = score(
        inputs.original, inputs.test, arguments.seq_len, arguments.windows, arguments.device
    )
    reports = {}
    for path in (ours, peer, *arguments.more):
        model = open_model(
            path, device=arguments.device, compute_dtype=torch.float32, allow_compressed=True
        )
        reports[path] = evaluate_model(model, base.windows, base)
        print(f"{path}: {reports[path].seconds:.0f} s", file=sys.stderr)
    base.close()

    rows, result = [], {"environment": environment(arguments.threads), "models": {}}
    lost = {}
    for path, report in reports.items():
        divergence = report.divergence
        assert divergence is not None, "an original was given"
        pairs = zip(report.window_losses, divergence.original_window_losses, strict=True)
        lost[path] = [model - original for model, original in pairs]
        loss, kl, same = (
            divergence.loss_over_original, divergence.kl_mean, divergence.top1_agreement
        )  # fmt: skip
        rows.append(
            (path.name, f"{loss.value:.4f} ({loss.low:.4f}-{loss.high:.4f})",
             f"{kl.value:.4f} ({kl.low:.4f}-{kl.high:.4f})", f"{same.value:.4f}",
             f"{report.perplexity:.3f}")
        )  # fmt: skip
        result["models"][str(path)] = report.model_dump(mode="json")
        result["models"][str(path)]["divergence"]["worst_tokens"] = []
    ratio, low, high = ratio_interval(lost[ours], lost[peer])
    met = high <= FIGURE
    result["ratio"] = {"value": ratio, "low": low, "high": high, "figure": FIGURE, "met": met}
    header = ("model", "loss over original (95 %)", "KL (95 %)", "top-1", "perplexity")
    protocol = next(iter(reports.values())).protocol.sentence()
    divergence = reports[ours].divergence
    assert divergence is not None
    shown = (
        f"{table(header, rows)}\n\nOriginal: perplexity {divergence.original_perplexity:.3f}. "
        f"Ratio of the losses over the original, ours to the peer's: **{ratio:.3f} "
        f"({low:.3f}-{high:.3f})**; figure: at most {FIGURE} at the upper end: "
        f"{'met' if met else 'missed'}.\n{protocol}"
    )
    publish("W4A16 symmetric g64, loss over the original", shown, result, arguments.record)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
