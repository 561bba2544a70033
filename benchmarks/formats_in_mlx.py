"""Whether mlx-lm computes from our MLX files what their weights say.

The random Llama of `formats_in_vllm.py`, rounded and exported with ``--to mlx``, is loaded by
mlx-lm (packages mlx[cpu] and mlx-lm, in an environment of their own); its log-probabilities of the
whole vocabulary are compared with those of the decoded weights in float32.

    python benchmarks/formats_in_mlx.py --mlx-python ENV/bin/python -o results.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from formats_in_vllm import TOKENS, expected, write_model

from pocketlm import api

IN_MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
logits = model(mx.array([json.loads(sys.argv[2])]))[0, :-1].astype(mx.float32)
found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
json.dump(found.tolist(), open(sys.argv[3], "w"))
"""


def in_mlx(python: str, directory: Path) -> torch.Tensor:
    """Log-probabilities [T - 1, V] as mlx-lm computes them.

    Raises:
        RuntimeError: With the end of its messages, if it does not load the model.
    """
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        command = [python, "-c", IN_MLX, str(directory), json.dumps(TOKENS), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not found.exists():
            raise RuntimeError(done.stderr[-1500:])
        return torch.tensor(json.loads(found.read_text()))


def main() -> None:
    """Prints and writes one row a grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlx-python", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for symmetric in (True, False):
            source = write_model(Path(place) / f"symmetric-{symmetric}", symmetric)
            dense, output = Path(place) / f"dense-{symmetric}", Path(place) / f"mlx-{symmetric}"
            api.export(source, dense, to="dense", dtype="float32")
            notes = api.export(source, output, to="mlx").notes
            reference_TV = expected(dense)
            found_TV = in_mlx(options.mlx_python, output)
            kl = float((reference_TV.exp() * (reference_TV - found_TV)).sum(-1).mean())
            rows.append({"format": "mlx", "symmetric": symmetric, "kl": kl, "losses": notes})
            print(rows[-1], flush=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
