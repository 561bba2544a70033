"""How fast does a Llama-3-8B decode on one GPU, and does the roofline know it beforehand?

Random weights of that shape, made on the device: bfloat16, and 4-bit codes in groups of 128 (head
in 4 bits and in bfloat16). Each decodes greedily through the loop that `generate` runs, tokens read
on the host as a stream would. Beside each: bytes a step reads over its time, as a share of the
bandwidth that copying reaches in the same run, and the prediction of `pocketlm roofline --device
auto`. Figures: 400 tokens/s at batch 1 with 4 bits, 150 in bfloat16, prediction within 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from typing import Any

import torch
from harness import environment, publish, table
from random_llama import LlamaShape, random_llama
from transformers import LlamaForCausalLM

from pocketlm.evaluate.devices import measured
from pocketlm.evaluate.hardware import weight_bytes_per_token
from pocketlm.evaluate.roofline import Widths, roofline
from pocketlm.models.shape import ModelShape, shape_of
from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.load import packed_summary

FIGURES = {("4 bits, head 4", 1): 400.0, ("bfloat16", 1): 150.0}
TOLERANCE = 0.15
KINDS: dict[str, tuple[int | None, int | None]] = {
    "4 bits, head 4": (4, 4),
    "4 bits, head bfloat16": (4, None),
    "bfloat16": (None, None),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=32, help="fewer for a quick try")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def decode_seconds(decoder: Decoder, prompt: int, new: int, runs: int) -> float:
    """Seconds of a step, median of runs after one that captures and warms up."""
    taken = []
    for _ in range(runs + 1):
        decoder.cut(0)
        decoder.prefill([list(range(5, 5 + prompt))] * decoder.rows, room=new + 2).read()
        decoder.step().read()
        start, newest = time.perf_counter(), decoder.step()
        for _ in range(new - 1):
            ahead = decoder.step()
            newest.read()
            newest = ahead
        newest.read()
        taken.append((time.perf_counter() - start) / new)
    return statistics.median(taken[1:])


def measure(kind: str, arguments: argparse.Namespace, shape: ModelShape) -> list[dict[str, Any]]:
    """All batches of one kind of weights."""
    bits, head_bits = KINDS[kind]
    model = random_llama(
        LlamaShape(blocks=arguments.blocks), "cuda", bits=bits, head_bits=head_bits
    )
    weight_bytes, _ = weight_bytes_per_token(model)
    head = weight_bytes_per_token_of(model.get_output_embeddings())
    values = sum(one.count * one.rows * one.columns for one in shape.linears)
    context = arguments.prompt + arguments.new // 2
    rows = []
    for batch in arguments.batches:
        device, decoder = measured(bits, batch), Decoder(model, batch)
        seconds = decode_seconds(decoder, arguments.prompt, arguments.new, arguments.runs)
        widths = Widths(
            weights=8 * (weight_bytes - head) / values,
            head=8 * head / (shape.head.rows * shape.head.columns),
        )
        predicted = roofline(shape, device, batch=batch, context=context, widths=widths)
        moved = weight_bytes + predicted.cache_bytes
        assert predicted.decode.predicted_seconds is not None  # the device was measured
        rows.append(
            {
                "kind": kind,
                "batch": batch,
                "tokens_per_second": batch / seconds,
                "step_ms": 1e3 * seconds,
                "gigabytes_per_second": moved / seconds / 1e9,
                "share_of_copying": moved / seconds / device.bandwidth,
                "bound_ms": 1e3 * predicted.decode.seconds,
                "predicted_ms": 1e3 * predicted.decode.predicted_seconds,
                "off": predicted.decode.predicted_seconds / seconds - 1,
                "product_share": device.product_share,
                "product_us": 1e6 * (device.product_seconds or 0.0),
                "operation_us": 1e6 * (device.step_seconds or 0.0),
                "loop": decoder.loop,
                "notes": decoder.notes,
                "kernels": dict(Counter(packed_summary(model).kernels)),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
        del decoder
    return rows


def weight_bytes_per_token_of(head: torch.nn.Module) -> int:
    """Bytes of the head."""
    return sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers()))


def main() -> int:
    """Exit code 1 where a figure is missed."""
    arguments = parse()
    llama = LlamaShape(blocks=arguments.blocks)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(llama.config())
    shape = shape_of(skeleton, "Llama-3-8B shape", torch.bfloat16, {})
    runs: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        try:
            runs += measure(kind, arguments, shape)
        except RuntimeError as error:  # one kind that fails does not take the others along
            print(f"{kind}: {error}", file=sys.stderr)
            runs.append({"kind": kind, "batch": 0, "error": str(error).splitlines()[0]})
        torch.cuda.empty_cache()
    header = (
        "weights", "batch", "tokens/s", "ms a step", "GB/s", "of copying", "bound ms",
        "predicted ms", "off", "figure",
    )  # fmt: skip
    shown, met = [], True
    for run in runs:
        if "error" in run:
            shown.append((run["kind"], "", f"failed: {run['error']}", *[""] * 7))
            met = False
            continue
        figure = FIGURES.get((run["kind"], run["batch"]))
        verdict = ""
        if figure is not None:
            good = run["tokens_per_second"] >= figure and abs(run["off"]) <= TOLERANCE
            met, verdict = met and good, f"≥ {figure:.0f}: {'met' if good else 'missed'}"
        shown.append(
            (
                run["kind"], run["batch"], f"{run['tokens_per_second']:.0f}",
                f"{run['step_ms']:.2f}", f"{run['gigabytes_per_second']:.0f}",
                f"{run['share_of_copying']:.0%}", f"{run['bound_ms']:.2f}",
                f"{run['predicted_ms']:.2f}", f"{run['off']:+.0%}", verdict,
            )
        )  # fmt: skip
    where = environment() | {"device": torch.cuda.get_device_name()}
    note = f"Prompt {arguments.prompt}, {arguments.new} new tokens, CUDA {torch.version.cuda}."
    publish(
        "Decoding a Llama-3-8B on one GPU",
        f"{table(header, shown)}\n\n{note}",
        {"environment": where, "runs": runs},
        arguments.record,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
