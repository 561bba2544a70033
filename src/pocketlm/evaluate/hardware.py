"""What a machine can do, and what a model asks of it: measured bandwidth, bytes a token reads."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

COPY_BYTES = 256 << 20  # well above any cache
COPIES = 5
CUDA_COPIES = 8  # that are waited for together: the wait takes as long as a small part of one


class LanguageModel(Protocol):
    """The part of a transformers model that tells embedding and head apart."""

    def get_input_embeddings(self) -> Any:
        """The embedding."""
        ...

    def get_output_embeddings(self) -> Any:
        """The head, or None."""
        ...

    def modules(self) -> Any:
        """All modules."""
        ...


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that copying moves, reads and writes counted: the fastest of a few copies.

    Args:
        device: Whose memory.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # touches the pages, and warms up
    seconds, together = [], CUDA_COPIES if device.type == "cuda" else 1
    for _ in range(COPIES):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES * together / min(seconds)


def weight_bytes_per_token(model: LanguageModel) -> tuple[int, tuple[str, ...]]:
    """Bytes of weights that decoding one token reads.

    Args:
        model: A loaded model; packed weights count as packed.

    Returns:
        All parameters and buffers once, but of an embedding that is no head one row; and notes.
    """
    tensors = {}
    fused_experts = False
    for module in model.modules():
        if isinstance(module, nn.Module):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            tensors.update({tensor.data_ptr(): tensor for tensor in own if tensor.numel()})
            fused_experts = fused_experts or "experts" in type(module).__name__.lower()
    total = sum(tensor.nbytes for tensor in tensors.values())
    head = model.get_output_embeddings()
    heads = set() if head is None else {tensor.data_ptr() for tensor in head.parameters()}
    for tensor in model.get_input_embeddings().parameters():
        if tensor.data_ptr() not in heads:
            total -= tensor.nbytes - tensor.nbytes // max(tensor.shape[0], 1)
    notes = ("all experts are counted as read for each token.",) if fused_experts else ()
    return total, notes


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: what the platform calls it stands
    return f"{name}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Waits for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
