"""Do our GGUF files run in llama.cpp, and does it compute the same?

A tiny random model of each family that is written, in F32 and Q8_0, and any files given: loaded by
llama-cpp-python, its log-probabilities compared with those of our own float32 run, of the same file
or, in F32, of the directory that it was made of. llama.cpp rounds activations to 8 bits beside
quantized weights. Figures: tokens equal; KL below 5e-3 on every file, below 1e-4 in F32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness import ROOT, environment, publish, table

sys.path.insert(0, str(ROOT))  # tiny models are those of the tests

TEXT = "The capital of France is Paris. In 1984 the 3rd edition\n\n didn't sell 1234 copies: naïve."
FIGURE, FIGURE_FLOAT = 5e-3, 1e-4
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", WIDE),
    "llama, biases, tied": ("llama-bias-tied", WIDE),
    "llama 3.1 rope": ("llama", {**WIDE, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral-window", {**WIDE, "sliding_window": 4096}),
    "qwen2": ("qwen2", {k: v for k, v in WIDE.items() if k != "head_dim"}),
    "qwen3": ("qwen3", WIDE),
    "gemma2": ("gemma2", {**WIDE, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", {**WIDE, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
    "phi3": ("phi3", {k: v for k, v in WIDE.items() if k != "head_dim"}),
}

NOT_READ = ("llama, biases, tied", "llama 3.1 rope")  # by transformers, which our reader relies on


def compare(path: Path, source: Path, text: str) -> tuple[bool, float, float]:
    """Whether both cut the text alike, and mean and largest KL of ours to llama.cpp's."""
    import numpy
    import torch
    from llama_cpp import Llama
    from tests.unit.models.test_families import streamed_logits

    from pocketlm.models import open_model

    model = open_model(source, compute_dtype=torch.float32)
    ids = model.tokenizer()(text).input_ids
    engine = Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1
    )
    theirs = engine.tokenize(text.encode(), add_bos=True, special=True)
    engine.eval(ids)
    got_TV = torch.from_numpy(numpy.array(engine.scores[: len(ids)])).double()
    want_TV = streamed_logits(model, torch.tensor([ids]))[0].double()
    ours_TV, got_TV = want_TV.log_softmax(-1), got_TV.log_softmax(-1)
    kl_T = (ours_TV.exp() * (ours_TV - got_TV)).sum(-1)
    return list(theirs) == list(ids), kl_T.mean().item(), kl_T.max().item()


def tiny_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """A file of each family and type, with the model that it is compared with."""
    from tests.unit.engine.test_export_gguf import bpe_tokenizer
    from tests.unit.models.families import build

    from pocketlm import api

    made: dict[str, tuple[Path, Path]] = {}
    for place, (label, (family, changes)) in enumerate(FAMILIES.items()):
        directory = folder / f"tiny-{place}"  # llama.cpp looks for names such as phi3 in it
        build(family, **changes).save_pretrained(directory)
        bpe_tokenizer().save_pretrained(directory)
        for kind in ("F32",) if label in NOT_READ else ("F32", "Q8_0"):
            path = folder / f"{directory.name}-{kind}.gguf"
            api.export(directory, path, to=f"gguf:{kind}")
            made[f"{label} {kind}"] = path, directory if kind == "F32" else path
    return made


def main() -> int:
    """Prints the table; exit code 1 where a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    arguments = parser.parse_args()
    rows, result, met = [], {"environment": environment(1), "files": {}}, True
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: (path, path) for path in arguments.files}
        files |= tiny_files(Path(folder))
        for label, (path, source) in files.items():
            text = TEXT if path in arguments.files else "ab12 ab!?cdefgh 77 ababa xyz"
            try:
                same, mean, most = compare(path, source, text)
            except Exception as error:  # an engine's refusal is a result
                rows.append((label, "–", "–", "–", str(error)[-70:]))
                met = False
                continue
            good = same and mean < (FIGURE_FLOAT if "F32" in label else FIGURE)
            met = met and good
            rows.append((label, "yes" if same else "no", f"{mean:.1e}", f"{most:.1e}",
                         "met" if good else "missed"))  # fmt: skip
            result["files"][label] = {"tokens_equal": same, "kl_mean": mean, "kl_max": most}
    shown = table(("file", "tokens equal", "KL", "largest", "figure"), rows)
    publish("GGUF in llama.cpp", shown, result, arguments.record)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
