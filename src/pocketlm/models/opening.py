"""From what a user names to a model view: a directory, a hub id, a GGUF file, a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pocketlm.core.errors import ConfigError
from pocketlm.core.views import TensorSource
from pocketlm.models.adapter import Model
from pocketlm.models.config import read_config, transformers_config
from pocketlm.models.experts import split_experts
from pocketlm.models.names import map_names
from pocketlm.models.skeleton import build_skeleton
from pocketlm.models.stream import SafetensorsSource
from pocketlm.models.tokenizer import load_tokenizer, side_files


def open_model(
    source: str | Path | PreTrainedModel,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_compressed: bool = False,
) -> Model:
    """Opens a causal language model as a stream of blocks, without reading its weights.

    Args:
        source: A directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory.
        device: Where blocks compute.
        compute_dtype: What they compute in; float32 on a CPU and bfloat16 elsewhere by default.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        allow_compressed: Whether our own artifacts open too, decoded as they are read.

    Returns:
        The model.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is no causal language model, or already quantized.
        SecurityError: If reading it would run foreign code.
    """
    device = torch.device(device)
    if compute_dtype is None:
        compute_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    directory = Path(source)
    config = read_config(directory)
    tensors: TensorSource = SafetensorsSource(directory)
    hf_config = transformers_config(directory, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(hf_config, compute_dtype, trust_remote_code=trust_remote_code)
    names = map_names(skeleton.model, tensors.infos(), str(directory))
    names, fused_experts = split_experts(skeleton, names)
    return Model(
        source=tensors,
        config=config,
        skeleton=skeleton,
        names=names,
        fused_experts=fused_experts,
        device=device,
        compute_dtype=compute_dtype,
        side_files=lambda: side_files(directory),
        load_tokenizer=lambda: load_tokenizer(directory, trust_remote_code=trust_remote_code),
    )
