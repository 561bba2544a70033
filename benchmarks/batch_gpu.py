"""What does a row more cost a step of continuous batching on a GPU? Tokens/s at 1 to 64 rows.

A random Llama of about a billion weights, bfloat16: times do not depend on values. Every row begins
with its own prompt of 128 tokens; then steps with the choice of tokens on the host, as `serve` runs
them. A joining prompt's time is shown too.
"""

from __future__ import annotations

import argparse
import time

import torch
from harness import environment, publish, table
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm.runtime.batch import Batch


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=arguments.blocks,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    batch, rows, found = Batch(model, 64), [], {}
    for wanted in (1, 4, 16, 64):
        started, first = time.perf_counter(), batch.active
        while batch.active < wanted:
            prompt = torch.randint(0, 1000, (128,)).tolist()
            rows.append(int(batch.join(prompt).argmax()))
        joining = (time.perf_counter() - started) / (wanted - first)
        for timed in (False, True):
            started = time.perf_counter()
            for _ in range(arguments.steps if timed else 5):
                rows = batch.advance(rows).argmax(-1).tolist()
        seconds = (time.perf_counter() - started) / arguments.steps
        found[wanted] = {
            "step ms": 1e3 * seconds,
            "tokens/s": wanted / seconds,
            "join ms": 1e3 * joining,
        }
    shown = table(
        ("rows", "ms a step", "tokens/s", "ms to join"),
        [(n, *(f"{value:.4g}" for value in row.values())) for n, row in found.items()],
    )
    result = {"environment": environment(), "rows": found, "loop": batch.loop, "notes": batch.notes}
    publish("what does a row more cost a step on a GPU?", shown, result, arguments.record)


if __name__ == "__main__":
    main()
