"""What auto-round makes of the same model, tokens and grid, and how long it takes.

Runs in auto-round's own environment, never in ours. Calibration comes as ready token windows
(.npy, int64 [N, T]). Settings are the tool's defaults: 200 iterations of 8 windows for each block,
learning rate 1 / iterations, both range ends tuned. The result is saved with its weights rounded
and decoded (the tool's format "fake"), which any evaluator reads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> int:
    """Runs the peer once and prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    import auto_round
    import numpy
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokens_NT = torch.from_numpy(numpy.load(arguments.tokens)).long()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tool = auto_round.AutoRound(
        model, AutoTokenizer.from_pretrained(arguments.model), scheme="W4A16",
        bits=arguments.bits, group_size=arguments.group_size, sym=True, iters=arguments.iters,
        nsamples=len(tokens_NT), seqlen=tokens_NT.shape[1], batch_size=8,
        dataset=[{"input_ids": row[None]} for row in tokens_NT],
        device_map=arguments.device, enable_torch_compile=False, amp=False,
    )  # fmt: skip
    tool.quantize_and_save(str(arguments.output), format="fake")
    seconds = time.perf_counter() - started
    (made,) = (path for path in arguments.output.iterdir() if path.is_dir())
    for file in made.iterdir():  # the tool adds a folder of its own
        file.replace(arguments.output / file.name)
    made.rmdir()
    config = json.loads((arguments.output / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the weights are decoded: an ordinary dense model
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    result = {"tool": f"auto-round {auto_round.__version__}", "bits": arguments.bits}
    print(json.dumps({**result, "iters": arguments.iters, "compress_seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
