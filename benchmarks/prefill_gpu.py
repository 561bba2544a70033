"""How long does a Llama-3-8B take over a prompt on one GPU, and what of that is arithmetic?

Random weights of that shape, made on the device: bfloat16, and 4-bit codes in groups of 128. Each
prompt runs through transformers' forward and through what `generate` runs, in turns, until the
first token is on the host. Beside them: what the products' operations take at the rate of large
bfloat16 products, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from harness import environment, publish, table
from random_llama import LlamaShape, random_llama
from transformers import LlamaForCausalLM

from pocketlm.evaluate.devices import measured
from pocketlm.models.shape import shape_of
from pocketlm.runtime.decode import Decoder

KINDS: dict[str, int | None] = {"4 bits": 4, "bfloat16": None}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=32, help="fewer for a quick try")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def seconds(decoder: Decoder, ids: list[int]) -> float:
    """One prompt from an empty cache to its first token on the host."""
    decoder.cut(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.prefill([ids]).read()
    return time.perf_counter() - start


def measure(kind: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths of one kind of weights."""
    llama = LlamaShape(blocks=arguments.blocks)
    model = random_llama(llama, "cuda", bits=KINDS[kind])
    with torch.device("meta"):
        shape = shape_of(LlamaForCausalLM(llama.config()), "", torch.bfloat16, {})
    values = sum(one.count * one.rows * one.columns for one in shape.linears)
    rate = measured(None, 1).rates["bf16"]
    both = {"own": Decoder(model, lean=False), "ours": Decoder(model)}
    rows = []
    for tokens in arguments.tokens:
        ids = torch.randint(5, 1000, (tokens,)).tolist()
        taken: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(arguments.runs + 2):
            for name, decoder in both.items():
                taken[name].append(seconds(decoder, ids))
        own, ours = (statistics.median(times[2:]) for times in taken.values())
        rows.append({"kind": kind, "tokens": tokens, "own": own, "ours": ours,
                     "bound": 2 * values * tokens / rate, "rate": rate,
                     "loop": both["ours"].loop, "notes": both["ours"].notes})  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Measures, prints, and appends to RESULTS.md where asked."""
    arguments = parse()
    runs = [row for kind in arguments.kinds for row in measure(kind, arguments)]
    header = ("weights", "tokens", "transformers ms", "ours ms", "times", "products ms", "share")
    shown = [
        (run["kind"], run["tokens"], f"{1e3 * run['own']:.1f}", f"{1e3 * run['ours']:.1f}",
         f"{run['own'] / run['ours']:.2f}", f"{1e3 * run['bound']:.1f}",
         f"{run['bound'] / run['ours']:.0%}")
        for run in runs
    ]  # fmt: skip
    where = environment() | {"device": torch.cuda.get_device_name()}
    note = f"{arguments.blocks} blocks; bfloat16 products at {runs[0]['rate'] / 1e12:.0f} TFLOP/s."
    publish(
        "Prompts of a Llama-3-8B on one GPU",
        f"{table(header, shown)}\n\n{note}",
        {"environment": where, "runs": runs},
        arguments.record,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
