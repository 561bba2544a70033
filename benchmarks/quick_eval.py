"""How far is a compressed model from its original? A quick answer, by transformers alone.

Loads Hugging Face directories (dense, or compressed-tensors, which is decompressed on load) as
transformers models in float32, and compares them on the first windows of a text: mean paired
difference of log-perplexity with a bootstrap interval, KL of the original to the model, top-1
agreement. The original's per-token loss and its full log-probabilities are never both kept: its
hidden states are cached on disk, and its head is applied again chunk by chunk.

It shares no code with `pocketlm`, so it is a cross-check of `pocketlm eval` too. It is no full
protocol: few windows by default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from harness import DATA, SCRATCH
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

CHUNK = 512  # positions whose logits are alive at once


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="directories to compare")
    parser.add_argument("--original", type=Path, default=SCRATCH / "original")
    parser.add_argument("--text", type=Path, default=DATA / "wikitext2-test.txt")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=None, help="default: beside the original")
    return parser.parse_args()


def windows_of(original: Path, text: Path, windows: int, seq_len: int) -> Tensor:
    """The first non-overlapping windows of the text, int64 [N, T]."""
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    count = min(windows, len(ids) // seq_len)
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def load(directory: Path) -> torch.nn.Module:
    """A float32 model whose linears are dense."""
    config = json.loads((directory / "config.json").read_text())
    settings = {}
    if "quantization_config" in config:
        from transformers import CompressedTensorsConfig

        settings["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings)
    return model.eval()


@torch.inference_mode()
def hidden_states(model: torch.nn.Module, tokens_T: Tensor) -> Tensor:
    """What the head reads, float32 [T, D]."""
    return model.base_model(input_ids=tokens_T[None], use_cache=False).last_hidden_state[0]


@torch.inference_mode()
def compare(
    hidden_TD: Tensor, base_TD: Tensor, head_VD: Tensor, base_head_VD: Tensor, tokens_T: Tensor
) -> Tensor:
    """Per predicted token: loss, the original's loss, KL, and top-1 agreement, [T - 1, 4]."""
    rows = []
    for start in range(0, len(tokens_T) - 1, CHUNK):
        stop = min(start + CHUNK, len(tokens_T) - 1)
        target_T1 = tokens_T[start + 1 : stop + 1, None]
        model_TV = torch.log_softmax(hidden_TD[start:stop] @ head_VD.T, dim=-1)
        base_TV = torch.log_softmax(base_TD[start:stop] @ base_head_VD.T, dim=-1)
        kl_T = (base_TV.exp() * (base_TV - model_TV)).sum(-1)
        same_T = (model_TV.argmax(-1) == base_TV.argmax(-1)).float()
        loss_T, base_T = -model_TV.gather(1, target_T1)[:, 0], -base_TV.gather(1, target_T1)[:, 0]
        rows.append(torch.stack([loss_T, base_T, kl_T, same_T], dim=1))
    return torch.cat(rows)


def interval(values_N: Tensor, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over windows."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values_N), (draws, len(values_N)), generator=generator)
    low, high = torch.quantile(values_N[picks].mean(1), torch.tensor([0.025, 0.975]).double())
    return low.item(), high.item()


def main() -> int:
    """Prints one line for each model, then JSON."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    text = arguments.text
    tokens_NT = windows_of(arguments.original, text, arguments.windows, arguments.seq_len)
    key = hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest()[:12]
    stamp = (arguments.original / "model.safetensors").stat().st_mtime_ns
    cache = arguments.cache or arguments.original.parent / "quick_eval_cache"
    cached = cache / f"{arguments.original.name}-{stamp}-{key}.pt"
    original = None
    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        original = load(arguments.original)
        states = torch.stack([hidden_states(original, tokens_T) for tokens_T in tokens_NT])
        head = original.get_output_embeddings().weight.detach().clone()
        torch.save({"states": states, "head": head}, cached)
        del original
    saved = torch.load(cached, weights_only=True)
    print(f"{len(tokens_NT)} windows of {arguments.seq_len} of {text.name}; float32")
    print(f"{'model':<40} {'loss over original':>30} {'KL':>9} {'top-1':>7} {'seconds':>8}")
    results = []
    for directory in arguments.models:
        started = time.perf_counter()
        model = load(directory)
        head_VD = model.get_output_embeddings().weight.detach()
        windows = []
        for tokens_T, base_TD in zip(tokens_NT, saved["states"], strict=True):
            found = compare(
                hidden_states(model, tokens_T), base_TD, head_VD, saved["head"], tokens_T
            )
            windows.append(found.double().mean(0))
        means_N4 = torch.stack(windows)
        over_N = means_N4[:, 0] - means_N4[:, 1]
        low, high = interval(over_N)
        result = {
            "model": str(directory),
            "loss_over_original": over_N.mean().item(),
            "interval_95": [low, high],
            "kl": means_N4[:, 2].mean().item(),
            "top1_agreement": means_N4[:, 3].mean().item(),
            "original_log_ppl": means_N4[:, 1].mean().item(),
            "seconds": time.perf_counter() - started,
        }
        results.append(result)
        shown = f"{result['loss_over_original']:.4f} ({low:.4f}-{high:.4f})"
        print(
            f"{directory.name:<40} {shown:>30} {result['kl']:>9.4f} "
            f"{result['top1_agreement']:>7.4f} {result['seconds']:>8.1f}"
        )
        del model
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
