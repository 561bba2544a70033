"""What HQQ makes of the same model: its own quantizer, written back as a dense directory.

Runs in HQQ's own environment, never in ours. Settings are the tool's defaults: asymmetric grid
along the rows, optimised zero points kept as fractions, scales and zero points in float16 (so
`bits + 32 / group_size` real bits). The head is left alone. No data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path


def main() -> int:
    """Quantizes every linear of the blocks; prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    import hqq
    import torch
    from hqq.core.quantize import Quantizer
    from safetensors.torch import load_file, save_file

    tensors = load_file(arguments.model / "model.safetensors")
    started = time.perf_counter()
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            codes, meta = Quantizer.quantize(
                weight.to(arguments.device), nbits=arguments.bits, group_size=arguments.group_size,
                axis=1, optimize=True, compute_dtype=torch.float32, device=arguments.device,
            )  # fmt: skip
            for key in ("scale", "zero"):
                meta[key] = meta[key].half().float()
            tensors[name] = Quantizer.dequantize(codes, meta).to(weight.dtype).cpu().contiguous()
    seconds = time.perf_counter() - started
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file in arguments.model.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, arguments.output)
    save_file(tensors, arguments.output / "model.safetensors", metadata={"format": "pt"})
    bits = arguments.bits + 32 / arguments.group_size
    print(json.dumps({"tool": f"hqq {hqq.__version__}", "bits": bits, "compress_seconds": seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
