"""The last check of `verify`: plain transformers, in a process of its own, gives our logits.

What transformers does at load, and when the weights it decodes are ours bit for bit, is written
down in `pocketlm.hf`. Asymmetric grids, integer experts and NVFP4 are decoded with a rounding more
there: our side of the comparison rounds the same weights so, and says it. Where a product is taken
in another order (experts' gate and up as one) distributions are compared instead of bits.
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
from pocketlm.models.decoded import DecodedSource

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
        unlike = as_library(view, artifact, index)
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


def as_library(view: Model, artifact: Artifact, index: CompressedIndex) -> str:
    """Makes a view round inputs and weights as transformers does; says what of it is known.

    Args:
        view: The artifact as we read it.
        artifact: Its configuration and stored tensors.
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
    said = ["the inputs of experts unrounded, as it runs them"] if experts else []
    rounded = decoded_in(artifact, index)
    if rounded:
        assert isinstance(view.source, DecodedSource)
        view.source.rounded_to = rounded
        names = " and ".join(sorted({str(d).removeprefix("torch.") for d in rounded.values()}))
        which = "weights of experts" if all(map(is_expert, rounded)) else "weights"
        said.append(f"{which} rounded to {names}, as it decodes them")
    return f" ({'; '.join(said)})" if said else ""


def decoded_in(artifact: Artifact, index: CompressedIndex) -> dict[str, torch.dtype]:
    """Compressed linear → the 16-bit dtype transformers decodes it in, whatever it is loaded in.

    In transformers 5.23 with compressed-tensors 0.20 integers are decoded in the dtype their scales
    are stored in, where the library decodes while it loads: experts, which it fuses, and every
    linear of a model that asks for ``dequantize`` (`formats.compressed_config`). NVFP4 is decoded
    in bfloat16.

    Args:
        artifact: Its configuration and stored tensors.
        index: What is compressed in it, in the format compressed-tensors.
    """
    at_once = artifact.config["quantization_config"].get("dequantize", False)
    found = {}
    for name, module in index.modules.items():
        if not isinstance(module.spec, QuantSpec):
            continue
        if module.spec.name == "NVFP4":
            found[name] = torch.bfloat16
        elif module.spec.type == "int" and (at_once or is_expert(name)):
            scales = artifact.tensors[f"{name}.weight_scale"][1].dtype
            if scales != torch.float32:
                found[name] = scales
    return found


def why_unequal(artifact: Artifact, index: CompressedIndex | None) -> str | None:
    """What transformers is known to do otherwise than one linear at a time, in float32.

    Args:
        artifact: It names the stored tensors.
        index: What is compressed in it; None: nothing.
    """
    names = artifact.tensors if index is None else index.modules
    if any(is_expert(name.removesuffix(".weight")) for name in names):
        return "multiplies the experts' gate and up as one"
    if index is None:
        return None
    for module in index.modules.values():
        rounded = isinstance(module.spec, QuantSpec) and not module.spec.symmetric
        if rounded or module.spec.name == "NVFP4":
            return "decodes asymmetric weights and NVFP4 otherwise in other releases"
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
