"""What this machine can do: memory, and rates that a short measurement gives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from pocketlm.core.columns import kernel_trouble
from pocketlm.core.errors import ConfigError
from pocketlm.core.state import Step

MEASURE_SECONDS = 0.3


def choose_device(name: str | torch.device) -> torch.device:
    """The device that a name stands for: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ConfigError: If it is no device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"'{name}' is no device.", where="--device", remedy="Give cpu or cuda."
        ) from None
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} CUDA devices that PyTorch can use.",
            where=f"--device {name}",
            remedy="Give --device cpu; `pocketlm doctor` lists the devices.",
        )
    # Without it cuBLAS may sum in any order, and PyTorch refuses to repeat itself exactly.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", device.index or 0)


def activation_device(device: torch.device, bytes_needed: int) -> torch.device:
    """Where activations between blocks lie: on the GPU where they take a quarter of what is free.

    Args:
        device: Where blocks compute.
        bytes_needed: Of all activations.
    """
    if device.type != "cuda" or 4 * bytes_needed > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def kernels_note(device: torch.device, steps: Sequence[Step]) -> str | None:
    """What is to be told where steps have kernels for a GPU that do not run on this one.

    The cause is told by its kind alone: a message may hold paths, and ledgers repeat themselves.

    Args:
        device: Where blocks compute.
        steps: Of a recipe.
    """
    with_kernel = any(step.cost(128, 128).kernel for step in steps)
    trouble = kernel_trouble() if device.type == "cuda" and with_kernel else None
    if trouble is None:
        return None
    kind = trouble.partition(":")[0]
    return (
        f"Triton kernels do not run on this GPU ({kind}): slower loops serve instead; "
        "`pocketlm doctor` says more."
    )


def cache_directory(part: str) -> Path:
    """Where findings of one kind outlive a run: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pocketlm" / part


def available_ram_bytes() -> int:
    """Memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def total_vram_bytes(device: torch.device) -> int:
    """Memory of a GPU; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


@lru_cache(maxsize=16)  # one run is predicted several times, from the same rates
def matmul_flops(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> float:
    """Measured floating-point operations a second of [tokens, width] x [width, width]."""
    left = torch.randn(tokens, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    seconds = _seconds_each(lambda: left @ right, device)
    return 2.0 * tokens * width * width / seconds


@lru_cache(maxsize=16)
def update_bytes(device: torch.device, each_call: float) -> float:
    """Measured bytes a second, read and written, of rank-one updates of a small matrix.

    Args:
        device: Where.
        each_call: Seconds of a small operation, which are not counted.
    """
    matrix, left = torch.zeros(64, 1024, device=device), torch.zeros(64, device=device)
    right = torch.zeros(1024, device=device)
    seconds = _seconds_each(lambda: matrix.addr_(left, right), device)
    return 8.0 * matrix.numel() / max(seconds - each_call, seconds / 10)


@lru_cache(maxsize=16)
def call_seconds(device: torch.device) -> float:
    """Measured seconds of one small tensor operation in a sequence."""
    small = torch.ones(256, device=device)
    return _seconds_each(lambda: small.mul_(1.0), device)


def _seconds_each(operation: Callable[[], Any], device: torch.device) -> float:
    operation()
    _wait(device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < MEASURE_SECONDS or count < 2:
        operation()
        _wait(device)
        count += 1
    return (time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
