"""What llm-compressor makes of the same model, tokens and grid, and how long it takes.

Runs in llm-compressor's own environment, never in ours. Calibration comes as ready token windows
(.npy or .pt, int64 [N, T]), so both tools see the very same tokens. Settings are the tool's own
defaults and recommendations: GPTQ with static activation order and dampening 0.01, min-max
observer, true-sequential layers by its `sequential` pipeline; AWQ with its default mappings and
search, on an asymmetric grid with --asym as its examples have it; SmoothQuant of strength 0.8
before GPTQ, as its W8A8 example has it; head left alone. --scheme names one of its presets
(W8A8, FP8_DYNAMIC …), which then also rounds inputs.

Two durations are printed. `compress_seconds` is the stage that both tools do: model read from
disk (warm cache) to the artifact saved. `oneshot_seconds` is the compression call inside it.
Imports are outside both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import time
from datetime import date
from pathlib import Path

QUANTIZERS = ("gptq", "awq", "smoothquant", "rtn")
PRUNERS = ("sparsegpt", "wanda", "magnitude")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("output", type=Path, help="directory for the artifact")
    parser.add_argument("--tokens", type=Path, help=".npy or .pt, int64 [N, T]; not for rtn")
    parser.add_argument("--method", choices=(*QUANTIZERS, *PRUNERS), default="gptq")
    parser.add_argument("--sparsity", default="0.5", help="of a pruner: a ratio, or N:M")
    parser.add_argument("--asym", action="store_true", help="a grid with zero points")
    parser.add_argument("--scheme", help="a preset of the tool; rules over bits and groups")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--observer", help="weight observer, e.g. mse (default: the tool's)")
    parser.add_argument("--dampening", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=1, help="calibration windows at once")
    parser.add_argument("--blocks", type=int, help="only the first blocks, for a quick look")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def load_tokens(path: Path):
    """The calibration windows, int64 [N, T]."""
    import numpy
    import torch

    if path.suffix == ".npy":
        return torch.from_numpy(numpy.load(path)).long()
    return torch.load(path, weights_only=True).long()


def build_recipe(arguments: argparse.Namespace):
    """The modifier with one weight-only group for every linear except the head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": not arguments.asym,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    if arguments.observer:
        weights["observer"] = arguments.observer
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if arguments.scheme:
        groups = {"scheme": arguments.scheme, "targets": "Linear", "ignore": ["lm_head"]}
    if arguments.method == "rtn":
        return QuantizationModifier(**groups)
    if arguments.method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        # The tool pins memory even where there is no accelerator, and stops there.
        _without_pinned_memory()
        return AWQModifier(**groups)
    gptq = GPTQModifier(dampening_frac=arguments.dampening, actorder="static", **groups)
    if arguments.method == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.8), gptq]
    return gptq


def build_pruner(arguments: argparse.Namespace):
    """The modifier that prunes every linear except the head.

    A plain name in `ignore` does not keep the tool's pruners from the head, and with a tied head
    from the embedding; a pattern does.
    """
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = SparseGPTModifier if arguments.method == "sparsegpt" else WandaPruningModifier
    nm = ":" in arguments.sparsity
    keep, of = (int(part) for part in arguments.sparsity.split(":")) if nm else (0, 0)
    ratio = 1 - keep / of if nm else float(arguments.sparsity)
    return kind(
        sparsity=ratio,
        mask_structure=f"{keep}:{of}",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )


def prune_by_magnitude(model, ratio: float) -> None:
    """The tool's own mask of the smallest weights of each linear; its modifier wants training."""
    import torch
    from llmcompressor.modifiers.pruning.utils.pytorch import (
        PruningMaskCreatorArgs,
        PruningMaskFactory,
    )

    creator = PruningMaskFactory.create_mask_creator("unstructured")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight
            mask = creator(PruningMaskCreatorArgs(weight, ratio, scores=weight.data.abs()))
            weight.data.mul_(mask)


def _without_pinned_memory() -> None:
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available() and hasattr(IntermediatesCache, "pin_memory"):
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def compress(arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Loads, compresses and saves.

    Returns:
        Seconds of the whole stage, seconds of the call inside it, and linears on the grid.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    settings = {} if arguments.blocks is None else {"num_hidden_layers": arguments.blocks}
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), **settings
    )
    calibration = {}
    if arguments.method not in ("rtn", "magnitude"):
        tokens_NT = load_tokens(arguments.tokens)
        rows = {"input_ids": tokens_NT.tolist()}
        rows["attention_mask"] = torch.ones_like(tokens_NT).tolist()
        calibration = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": tokens_NT.shape[0],
            "max_seq_length": tokens_NT.shape[1],
            "batch_size": arguments.batch_size,
            "shuffle_calibration_samples": False,
        }
    before = time.perf_counter()
    pruning = arguments.method in PRUNERS
    if arguments.method == "magnitude":
        prune_by_magnitude(model, float(arguments.sparsity))
    else:
        recipe = build_pruner(arguments) if pruning else build_recipe(arguments)
        oneshot(model=model, recipe=recipe, **calibration)
    after = time.perf_counter()
    model.save_pretrained(arguments.output, save_compressed=not pruning)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    ended = time.perf_counter()
    schemes = [getattr(module, "quantization_scheme", None) for module in model.modules()]
    return ended - started, after - before, sum(scheme is not None for scheme in schemes)


def main() -> int:
    """Runs the peer once and prints one JSON object as the last line."""
    arguments = parse()
    if arguments.method not in ("rtn", "magnitude") and arguments.tokens is None:
        print(f"error: --tokens is needed for {arguments.method}", file=sys.stderr)
        return 2
    if arguments.output.exists():
        if not arguments.overwrite:
            print(f"error: {arguments.output} exists; use --overwrite", file=sys.stderr)
            return 2
        shutil.rmtree(arguments.output)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch starts its pool
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import compressed_tensors
    import llmcompressor
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds, oneshot_seconds, linears = compress(arguments)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "tool": f"llmcompressor {llmcompressor.__version__}",
        "method": arguments.method,
        "scheme": arguments.scheme,
        "sparsity": arguments.sparsity if arguments.method in PRUNERS else None,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "dtype": arguments.dtype,
        "observer": arguments.observer or "default",
        "blocks": arguments.blocks,
        "linears": linears,
        "compress_seconds": round(seconds, 2),
        "oneshot_seconds": round(oneshot_seconds, 2),
        "peak_rss_mib": round(peak_bytes / 2**20, 1),
        "output": str(arguments.output),
        "output_bytes": sum(file.stat().st_size for file in arguments.output.iterdir()),
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": date.today().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "compressed-tensors": compressed_tensors.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
