"""Does a packed smollm2-135m decode faster on a CPU than transformers' bfloat16 and llama.cpp?

Batch 1, all at the same number of threads, head compressed like the rest: our 4 bits in groups of
64 (4.5 real bits) beside Q4_0 (4.5) and transformers' `generate` in bfloat16; our 8 bits with a
scale a row (8.0) beside Q8_0 (8.5). Each runs in a process of its own, and they take turns within
one run, so that a busy machine is busy for all. Weights of ours are random ones of that shape,
llama.cpp's are the demo model rounded to its types: times do not depend on values. Figures: 4 bits
at least 2 × transformers and at least Q4_0; 8 bits at least 2 × transformers and at least Q8_0.

llama.cpp runs through node-llama-cpp: ``npm i --ignore-scripts node-llama-cpp`` in FOLDER, then
``--llama-cpp FOLDER``; without it those rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import QUIET_THREADS, SCRATCH, environment, publish, table

SIZES = {"hidden": 576, "feed_forward": 1536, "blocks": 30, "heads": 9, "kv_heads": 3}
VOCABULARY = 49152
FIGURES = (("ours W4", "transformers", 2.0), ("ours W4", "llama.cpp Q4_0", 1.0),
           ("ours W8", "transformers", 2.0), ("ours W8", "llama.cpp Q8_0", 1.0))  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24, help="of a turn")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER")
    parser.add_argument("--worker", choices=("ours W4", "ours W8", "transformers"))
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def write_gguf(kind: str) -> Path:
    """The demo model with every matrix, the embedding that is its head too, in one type."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    from pocketlm.models.opening import demo_file

    path = SCRATCH / f"smollm2-{kind}.gguf"
    if path.exists():
        return path
    SCRATCH.mkdir(parents=True, exist_ok=True)
    reader, wanted = GGUFReader(demo_file()), GGMLQuantizationType[kind]
    writer = GGUFWriter(path.with_suffix(".part"), "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        outer = field.types[0]
        inner = field.types[-1] if outer == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), outer, inner)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").replace(path)
    return path


def work(arguments: argparse.Namespace) -> None:
    """A Python worker: says its bytes, then answers ``go N`` lines."""
    import torch
    from random_llama import LlamaShape, random_llama

    from pocketlm.evaluate.hardware import weight_bytes_per_token
    from pocketlm.runtime.decode import Decoder

    torch.set_num_threads(arguments.threads)
    shape = LlamaShape(**SIZES, vocabulary=VOCABULARY)
    bits = {"ours W4": 4, "ours W8": 8}.get(arguments.worker)
    group = 64 if bits == 4 else None
    model = random_llama(shape, "cpu", bits=bits, group=group, head_bits=bits)
    prompt, decoder, stamps = list(range(5, 5 + arguments.prompt)), Decoder(model), []

    class Stamps:
        """A streamer that notes when a token comes."""

        def put(self, value: Any) -> None:
            """Called with the prompt, then with each token."""
            stamps.append((time.perf_counter(), time.process_time()))

        def end(self) -> None:
            """Nothing to do."""

    def ours(tokens: int) -> None:
        decoder.cut(0)
        decoder.prefill([prompt], room=tokens).read()
        Stamps().put(None)
        for _ in range(tokens - 1):
            decoder.step().read()
            Stamps().put(None)

    def theirs(tokens: int) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=0, streamer=Stamps(),
            )  # fmt: skip
        stamps.pop(0)  # the prompt

    run = theirs if bits is None else ours
    run(4)
    loop = "generate, bfloat16" if bits is None else decoder.loop
    told = {"bytes": weight_bytes_per_token(model)[0], "loop": loop, "notes": decoder.notes}
    print("ready", json.dumps(told), flush=True)
    for line in sys.stdin:
        stamps.clear()
        run(int(line.split()[1]))
        (start, cpu_start), (stop, cpu_stop) = stamps[0], stamps[-1]
        answer = {"tokens": len(stamps) - 1, "seconds": stop - start, "cpu": cpu_stop - cpu_start}
        print(json.dumps(answer), flush=True)


class Worker:
    """A child that decodes when told to."""

    def __init__(self, command: list[str], threads: int, told: dict[str, Any]) -> None:
        pinned = {**os.environ, **QUIET_THREADS, "OMP_NUM_THREADS": str(threads)}
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=pinned
        )
        words = self._line().removeprefix("ready").strip()
        self.told = told | (json.loads(words) if words else {})

    def go(self, tokens: int) -> dict[str, float]:
        """One turn."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"go {tokens}\n")
        self.child.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"{self.child.args} ended")
        return line


def start(arguments: argparse.Namespace) -> dict[str, Worker]:
    """All workers, idle."""
    own = [sys.executable, __file__, "--threads", str(arguments.threads)]
    own += ["--prompt", str(arguments.prompt), "--worker"]
    workers = {
        name: Worker([*own, name], arguments.threads, {})
        for name in ("ours W4", "ours W8", "transformers")
    }
    if arguments.llama_cpp is not None:
        script = str(Path(__file__).with_name("peers") / "llama_decode.mjs")
        for kind in ("Q4_0", "Q8_0"):
            path = write_gguf(kind)
            command = ["node", script, str(arguments.llama_cpp.resolve()), str(path)]
            command += [str(arguments.threads), str(arguments.prompt)]
            told = {"bytes": path.stat().st_size, "loop": "llama.cpp"}
            workers[f"llama.cpp {kind}"] = Worker(command, arguments.threads, told)
    return workers


def main() -> int:
    """Exit code 1 where a figure is missed."""
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return 0
    workers = start(arguments)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            turns[name].append(worker.go(arguments.tokens))
    for worker in workers.values():
        worker.child.kill()
    speed = {name: [t["tokens"] / t["seconds"] for t in found] for name, found in turns.items()}
    cpu = {name: [1e3 * t["cpu"] / t["tokens"] for t in found] for name, found in turns.items()}
    rows = [
        (name, f"{worker.told['bytes'] / 1e6:.0f}", f"{statistics.median(speed[name]):.1f}",
         f"{max(speed[name]):.1f}", f"{statistics.median(cpu[name]):.1f}", worker.told["loop"])
        for name, worker in workers.items()
    ]  # fmt: skip
    lines, verdicts = [], []
    for name, peer, wanted in FIGURES:
        if peer not in workers:
            continue
        ratios = [a / b for a, b in zip(speed[name], speed[peer], strict=True)]
        ratio = statistics.median(ratios)
        verdicts.append(ratio >= wanted)
        lines.append(
            f"{name} is {ratio:.2f} × {peer} (median of {len(ratios)} rounds, {min(ratios):.2f} to "
            f"{max(ratios):.2f}); wanted {wanted:.0f} ×: {'met' if verdicts[-1] else 'missed'}."
        )
    header = ("engine", "MB a token", "tokens/s", "best turn", "CPU ms a token", "loop")
    publish(
        "Decoding smollm2-135m on a CPU",
        "\n\n".join([table(header, rows), *lines]),
        {
            "environment": environment(arguments.threads),
            "told": {name: worker.told for name, worker in workers.items()},
            "turns": turns,
        },
        arguments.record,
    )
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
