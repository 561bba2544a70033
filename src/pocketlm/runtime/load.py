"""`load`: from a path to a model that generates, its linears running from packed weights.

Compressed artifacts keep their codes packed in memory; originals load the same way, unpacked, so
that before and after are compared on one road.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ConfigError
from pocketlm.core.factored import LowRank, Sum
from pocketlm.core.permuted import Permuted
from pocketlm.core.tensors import PackedFloat, PackedInt, Sparse, WeightTensor
from pocketlm.engine.machine import choose_device
from pocketlm.runtime.dtypes import default_dtype
from pocketlm.runtime.embedding import PackedEmbedding
from pocketlm.runtime.factored import LowRankLinear, RoundedInputs, SumLinear
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.permuted import PermutedLinear
from pocketlm.runtime.semi_structured import make_sparse, refuses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("pocketlm.runtime")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model to run: a compressed artifact, or any original.

    Args:
        path: A directory, a hub id, a `.gguf` file or `smollm2-135m`.
        device: Where it runs, such as ``cpu`` or ``cuda``.
        dtype: What it computes in; None: see runtime/dtypes.py. The choice is logged.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Returns:
        The transformers model, in eval mode, and its tokenizer. Compressed linears are
        PackedLinear; `packed_summary` tells which kernels they got.

    Raises:
        ConfigError: If the device is absent or the dtype is none of float32, bfloat16, float16.
        SourceError: If the model cannot be read.
        UnsupportedModel: If it is quantized in a way that is not read here.
    """
    from pocketlm.models.opening import resolve
    from pocketlm.models.runtime_model import is_compressed, runtime_model

    place, resolved = choose_device(device), resolve(path, revision=revision)
    if dtype is None:
        int4 = is_compressed(resolved) and _mostly_int4(resolved)
        dtype, reason = default_dtype(place, int4=int4)
        log.info("computing in %s: %s", str(dtype).removeprefix("torch."), reason)
    if dtype not in DTYPES:
        raise ConfigError(f"cannot compute in {dtype}.", where="dtype", remedy=f"One of {DTYPES}.")

    zeros_multiplied: set[str] = set()  # why, of sparse weights

    def make_linear(
        weight: WeightTensor, bias: Tensor | None, quantizer: InputQuantizer | None
    ) -> nn.Module:
        if isinstance(weight, Permuted):
            inner = make_linear(weight.values, bias, quantizer)
            return PermutedLinear(inner, weight.order_I.to(place))
        if isinstance(weight, Sum):  # the base and the factors see the same rounded inputs
            return SumLinear(
                make_linear(weight.base, bias, quantizer), make_linear(weight.low, None, quantizer)
            )
        if isinstance(weight, LowRank):
            return LowRankLinear(
                make_linear(weight.left, bias, None), make_linear(weight.right, None, quantizer)
            )
        if isinstance(weight, Sparse):
            reason = refuses(weight, dtype, place)
            if reason is None and quantizer is None:
                return make_sparse(_dense_linear(weight.dequantize(dtype), bias, place))
            zeros_multiplied.add(reason or "its inputs are rounded")
            weight = weight.values
        if not isinstance(weight, PackedInt | PackedFloat):
            linear = _dense_linear(weight.dequantize(dtype), bias, place)
            return linear if quantizer is None else RoundedInputs(linear, quantizer.to(place))
        return PackedLinear(weight, bias, quantizer, dtype=dtype, device=place)

    def make_embedding(weight: WeightTensor, layer: nn.Embedding) -> PackedEmbedding:
        return PackedEmbedding(weight, layer, dtype=dtype, device=place)

    model, tokenizer = runtime_model(
        resolved,
        make_linear,
        make_embedding,
        device=place,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    for reason in sorted(zeros_multiplied):
        log.warning("zeros of a sparse model are multiplied like other values: %s", reason)
    return model, tokenizer


def _dense_linear(weight_OI: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    rows, columns = weight_OI.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.to(device), requires_grad=False)
    if bias is not None:
        kept = bias.to(device, weight_OI.dtype)
        linear.bias = nn.Parameter(kept, requires_grad=False)
    return linear


@dataclass(frozen=True)
class PackedSummary:
    """What of a loaded model is packed, and what multiplies it.

    Attributes:
        linears: Number of packed linears.
        packed_bytes: Bytes of their weights in memory.
        weights: Number of weights they hold.
        kernels: Kernel name → linears that use it.
        fallbacks: Module path → why no fast kernel took it.
    """

    linears: int
    packed_bytes: int
    weights: int
    kernels: Mapping[str, int]
    fallbacks: Mapping[str, str]


def packed_summary(model: nn.Module) -> PackedSummary:
    """Counts the packed linears of a model and their kernels."""
    packed = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    fallbacks = {
        path: "; ".join(f"{name} {why}" for name, why in m.choice.refused.items())
        for path, m in packed.items()
        if m.choice.is_fallback
    }
    return PackedSummary(
        linears=len(packed),
        packed_bytes=sum(m.packed_bytes for m in packed.values()),
        weights=sum(m.in_features * m.out_features for m in packed.values()),
        kernels=dict(Counter(m.choice.kernel.name for m in packed.values())),
        fallbacks=fallbacks,
    )


def _mostly_int4(directory: Path) -> bool:
    """Whether most groups of the configuration are integers of at most 4 bits."""
    section = json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]
    groups = _weights(section)
    small = [w for w in groups if w.get("type", "int") == "int" and w["bits"] <= 4]
    return len(small) * 2 > len(groups)


def _weights(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Type and bits of each group, as the formats name them."""
    if "bits" in section:
        return [dict(section)]
    if "config_groups" in section:
        groups = [group.get("weights") or {} for group in section["config_groups"].values()]
        return [{**weights, "bits": weights["num_bits"]} for weights in groups if weights]
    forms = [group["weights"] for group in section.get("groups", [])]
    return [form for form in map(_values, forms) if "bits" in form]


def _values(form: dict[str, Any]) -> dict[str, Any]:
    """The values of a form that is made of others: sparse, in factors, in two parts."""
    inner = next((form[key] for key in ("values", "base", "right") if key in form), None)
    return form if inner is None else _values(inner)
