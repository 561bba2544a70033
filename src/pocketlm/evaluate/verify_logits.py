"""The last check of `verify`: plain transformers, in a process of its own, gives our logits.

What transformers does at load, and when the weights it decodes are ours bit for bit, is written
down in `pocketlm.hf`. Asymmetric grids with scales of 16 bits, NVFP4 and experts are decoded with a
rounding more there: their distributions are compared instead of their bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.views import ModelView
from pocketlm.engine.machine import available_ram_bytes
from pocketlm.evaluate.engines.compare import divergence
from pocketlm.evaluate.verify_files import Artifact, NotChecked
from pocketlm.formats import compressed_tensors
from pocketlm.formats.capabilities import is_expert
from pocketlm.formats.read import CompressedIndex
from pocketlm.models import open_model
from pocketlm.models.adapter import Model

TOKENS = 16  # of the sequence
KL_LIMIT = 1e-4  # nats, where bits cannot agree
RAM_MARGIN = 1.25  # of the dense float32 weights, for what loading needs beside them
MINUTES_AT_MOST = 30


def check_logits(artifact: Artifact) -> str:
    """Plain transformers computes the same float32 logits."""
    index = artifact.index
    by_library = index is not None and index.format == compressed_tensors.NAME
    if by_library:
        _require_library()
    _require_memory(artifact)
    view, unlike = open_model(artifact.path, allow_compressed=True), ""
    if index is not None and by_library:
        unlike = round_as_library(view, index)
    tokens = [(3 + 7919 * i) % view.vocabulary for i in range(TOKENS)]
    ours_TV = view_logits(view, tokens)
    theirs_TV = _logits_elsewhere(artifact.path, tokens, ours_TV.shape)
    if torch.equal(ours_TV, theirs_TV):
        digest = hashlib.sha256(ours_TV.contiguous().numpy().tobytes()).hexdigest()
        return f"bit-equal to transformers{unlike}, float32, {TOKENS} tokens, sha256 {digest}."
    largest = float((ours_TV - theirs_TV).abs().max())
    kl = float(divergence(ours_TV, theirs_TV).mean())
    reason = why_unequal(artifact, index)
    experts = index is not None and any(map(is_expert, index.modules))
    if reason and (by_library or index is None or experts) and kl < KL_LIMIT:
        return (
            f"KL to transformers{unlike} {kl:.1e} (limit {KL_LIMIT:.0e}); not bit-equal, because "
            f"transformers {reason}."
        )
    raise ArtifactError(
        f"transformers' logits differ by up to {largest:.3g} (KL {kl:.1e}).",
        remedy="Check that no other release of transformers or compressed-tensors is installed "
        "than the model card asks for.",
    )


class _OneScale(InputQuantizer):
    """What compressed-tensors 0.20 does per token: one scale for all tokens of a matrix [T, I]."""

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ of [B, T, I] per token, of [T, I] as a whole."""
        return super().__call__(x) if x.dim() > 2 else super().__call__(x.view(1, -1)).view(x.shape)


def round_as_library(view: Model, index: CompressedIndex) -> str:
    """Makes a view round inputs as transformers does; says what that leaves out.

    Args:
        view: The artifact as we read it.
        index: What is compressed in it, in the format compressed-tensors.

    Raises:
        NotChecked: If transformers does not load experts as they are stored for other engines.
    """
    experts = [name for name in view.quantizers if is_expert(name)]
    grids = {name: index.modules[name].spec for name in experts}
    if any(isinstance(spec, QuantSpec) and spec.type == "int" for spec in grids.values()):
        raise NotChecked(
            "transformers loads no integer experts whose inputs are rounded; the artifact was made "
            "for another engine."
        )
    view.quantizers = {
        name: _OneScale(q.spec) if q.spec.granularity == "token" else q
        for name, q in view.quantizers.items()
        if name not in experts
    }
    return " (the inputs of experts unrounded, as it runs them)" if experts else ""


def why_unequal(artifact: Artifact, index: CompressedIndex | None) -> str | None:
    """What transformers is known to do otherwise than float32 weights, one linear at a time.

    Args:
        artifact: It names the stored tensors.
        index: What is compressed in it; None: nothing.
    """
    if index is None:
        experts = any(is_expert(name.removesuffix(".weight")) for name in artifact.tensors)
        return "multiplies the experts' gate and up as one" if experts else None
    if any(is_expert(name) for name in index.modules):
        return "multiplies the experts' gate and up as one, in the dtype of their scales"
    for module in index.modules.values():
        if not isinstance(module.spec, QuantSpec):
            continue
        if not module.spec.symmetric and _scale_dtype(artifact, module.name) != torch.float32:
            return "rounds asymmetric weights to the dtype of their scales"
        if module.spec.name == "NVFP4":
            return "rounds NVFP4 weights to bfloat16"
    return None


def view_logits(view: ModelView, tokens: list[int]) -> Tensor:
    """float32 logits [T, V] of one sequence through a model view, block by block."""
    with torch.no_grad():
        hidden_BTD, call = view.begin(torch.tensor([tokens], device=view.device))
        for index in range(len(view.block_paths)):
            with view.block(index) as block:
                hidden_BTD = block.forward(hidden_BTD, call)
        return view.logits(view.finish(hidden_BTD)[0]).float().cpu()


def _logits_elsewhere(path: Path, tokens: list[int], shape: torch.Size) -> Tensor:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits"
        command = [sys.executable, "-m", "pocketlm.hf", str(path), str(out)]
        command += [str(token) for token in tokens]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=60 * MINUTES_AT_MOST, check=False
            )
        except subprocess.TimeoutExpired:
            raise NotChecked(f"transformers took more than {MINUTES_AT_MOST} minutes.") from None
        if done.returncode < 0:
            raise NotChecked(
                f"the process that ran transformers was ended by signal {-done.returncode}, "
                "as it is when memory runs out."
            )
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ArtifactError(f"transformers cannot load it: {last}")
        values = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32)
    if values.numel() != math.prod(shape):
        raise ArtifactError(f"transformers gives {values.numel()} logits, not {tuple(shape)}.")
    return values.view(shape)


def _scale_dtype(artifact: Artifact, module: str) -> torch.dtype:
    return artifact.tensors[f"{module}.weight_scale"][1].dtype


def _require_library() -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise NotChecked(
            "compressed-tensors is not installed; `pip install compressed-tensors` has it checked."
        )


def _require_memory(artifact: Artifact) -> None:
    """Loading with dense float32 weights takes memory that `verify` must not take blindly."""
    entries = artifact.ledger.tensors.values() if artifact.ledger is not None else ()
    shapes = [entry.shape for entry in entries if entry.action != "dropped"]
    bytes_needed = int(RAM_MARGIN * 4 * sum(math.prod(shape) for shape in shapes))
    free = available_ram_bytes()
    if bytes_needed > free:
        raise NotChecked(
            f"transformers would need about {bytes_needed / 2**30:.1f} GiB for dense float32 "
            f"weights, {free / 2**30:.1f} GiB are free; run it on a larger machine."
        )
