"""Loads an artifact where only transformers and compressed-tensors are installed, without pocketlm.

    python reload_plain.py ARTIFACT

prints one line of JSON: the sha256 of the float32 logits of a fixed sequence (the one that
`pocketlm verify` names in its last check) and the versions that computed them. Exit code 1 if
pocketlm can be imported: the environment would prove nothing.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import sys

import torch
from transformers import AutoModelForCausalLM

TOKENS = 16


def main(path: str) -> None:
    """Prints hash and versions."""
    if importlib.util.find_spec("pocketlm") is not None:
        sys.exit("pocketlm is installed here; run this in an environment without it.")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [(3 + 7919 * i) % vocabulary for i in range(TOKENS)]
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens]), use_cache=False).logits[0].float().contiguous()
    packages = ("torch", "transformers", "compressed-tensors")
    found = {
        "sha256": hashlib.sha256(logits_TV.numpy().tobytes()).hexdigest(),
        "shape": list(logits_TV.shape),
        "finite": bool(torch.isfinite(logits_TV).all()),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
