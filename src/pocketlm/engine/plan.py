"""Predicts a run before a weight is read: bytes, memory, disk, time; refuses what cannot work.

Shapes come from the checkpoint's headers, rates from half a second of measurement.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from pocketlm.core.errors import BudgetError
from pocketlm.core.state import LinearStep
from pocketlm.core.views import ModelView
from pocketlm.engine.grids import Grids, scale_dtype_for
from pocketlm.engine.machine import (
    available_ram_bytes,
    call_seconds,
    matmul_flops,
    resident_bytes,
    total_vram_bytes,
)
from pocketlm.engine.memory import hidden_bytes, hidden_width, run_bytes
from pocketlm.engine.options import Job
from pocketlm.formats import format_for
from pocketlm.formats.safetensors_header import element_bytes

READ_BYTES_PER_SECOND = 400e6  # a slow NVMe disk; read, hashed, packed and written again
FIXED_BYTES = 250 << 20  # allocator slack, thread stacks, buffers of the readers and writers


class Plan(BaseModel):
    """What a run will make and take.

    Attributes:
        source: As the user named it.
        method: The recipe's steps.
        format: Of the artifact.
        target: Engine whose rules were checked.
        device: Where blocks compute.
        blocks: Decoder blocks.
        linears: Linears that are compressed.
        source_bytes: Of the source's tensors.
        output_bytes: Of the artifact's tensors.
        bits_per_weight: Real bits of the compressed linears.
        samples: Calibration windows; 0 where no step needs data.
        seq_len: Tokens of each.
        activations: "memory" or "disk".
        peak_ram_bytes: Of the process.
        peak_vram_bytes: On the GPU.
        disk_transient_bytes: Needed beside the output while the run lives.
        resume_seconds: What recomputing activations costs at worst after a kill.
        seconds: Of the whole run.
        kept: Linears that keep their precision, and why.
        notes: What was changed about the grids.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    method: str
    format: str
    target: str
    device: str
    blocks: int
    linears: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    samples: int
    seq_len: int
    activations: str
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_transient_bytes: int
    resume_seconds: float
    seconds: float
    kept: dict[str, str]
    notes: dict[str, str]


def make_plan(model: ModelView, job: Job, grids: Grids, samples: int, seq_len: int) -> Plan:
    """Predicts a job.

    Args:
        model: The source.
        job: What is to be done.
        grids: The fitted grids.
        samples: Calibration windows.
        seq_len: Tokens of each.

    Returns:
        The plan.
    """
    shapes = {name: shape for name, shape in model.linear_shapes().items() if name in grids.specs}
    tokens = samples * seq_len if job.needs_data else 0
    sizes = _sizes(model, job, grids)
    seconds, forward = _seconds(model, job, shapes, tokens, sizes["source"])
    in_memory = hidden_bytes(model, tokens) <= job.activation_bytes
    working = _working_bytes(model, job, shapes, tokens, in_memory)
    on_gpu = model.device.type == "cuda"
    host_hidden = hidden_bytes(model, tokens) if in_memory else 0
    host = resident_bytes() + FIXED_BYTES + host_hidden + _largest_chunk(model)
    linear_bits = sum(_bits(grids, name, shape) for name, shape in shapes.items())
    return Plan(
        source=job.source,
        method=" → ".join(step.method for step in job.recipe.steps),
        format=grids.format_name,
        target=job.target,
        device=str(model.device),
        blocks=len(model.block_paths),
        linears=len(shapes),
        source_bytes=sizes["source"],
        output_bytes=sizes["output"],
        bits_per_weight=linear_bits / sum(math.prod(shape) for shape in shapes.values()),
        samples=samples if tokens else 0,
        seq_len=seq_len if tokens else 0,
        activations="memory" if in_memory else "disk",
        peak_ram_bytes=host if on_gpu else host + working,
        peak_vram_bytes=working if on_gpu else 0,
        disk_transient_bytes=sizes["blocks"]
        + (0 if in_memory else 2 * hidden_bytes(model, tokens)),
        resume_seconds=forward if in_memory else 0.0,
        seconds=seconds,
        kept=dict(grids.kept),
        notes=dict(grids.notes),
    )


def refuse_impossible(plan: Plan, output: Path, device: torch.device) -> None:
    """Stops a run that lacks memory or disk before it begins.

    Raises:
        BudgetError: Saying what is short, by how much, and which setting lowers it.
    """
    parent = next(p for p in (output, *output.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = plan.output_bytes + plan.disk_transient_bytes
    if needed > free:
        raise BudgetError(
            f"{needed:,} bytes of disk are needed, {free:,} are free.",
            where=str(parent),
            remedy="Free space, or choose another place with -o.",
        )
    more = plan.peak_ram_bytes - resident_bytes()
    if more > available_ram_bytes():
        raise BudgetError(
            f"{more:,} more bytes of memory are needed, {available_ram_bytes():,} are available.",
            where="memory",
            remedy="Lower --samples, --seq-len or --activation-budget.",
        )
    vram = total_vram_bytes(device)
    if plan.peak_vram_bytes > vram:
        raise BudgetError(
            f"{plan.peak_vram_bytes:,} bytes of GPU memory are needed, the GPU has {vram:,}.",
            where=str(device),
            remedy="Lower --activation-budget or --seq-len, or use --device cpu.",
        )


def _sizes(model: ModelView, job: Job, grids: Grids) -> dict[str, int]:
    """Bytes of the source, of the artifact and of the compressed blocks in it."""
    section = format_for(grids.format_name)
    shapes = model.linear_shapes()
    totals = {"source": 0, "output": 0, "blocks": 0}
    for name, info in model.source.infos().items():
        totals["source"] += info.bytes_stored
        if name in model.repeated:
            continue
        module = name.removesuffix(".weight")
        if module in grids.specs and module in shapes:
            scale = scale_dtype_for(info.dtype)
            stored = section.stored_bytes(grids.specs[module], shapes[module], scale)
            totals["blocks"] += stored
            totals["output"] += stored
        elif job.dtype is not None and info.dtype.is_floating_point:
            totals["output"] += math.prod(info.shape) * element_bytes(job.dtype)
        else:
            totals["output"] += info.bytes_stored
    return totals


def _bits(grids: Grids, name: str, shape: tuple[int, int]) -> int:
    return grids.specs[name].stored_bits(shape)


def _seconds(
    model: ModelView,
    job: Job,
    shapes: Mapping[str, tuple[int, int]],
    tokens: int,
    source_bytes: int,
) -> tuple[float, float]:
    """Seconds of the whole run, and of one forward pass over the calibration data."""
    rate = matmul_flops(model.device, model.compute_dtype, job.tokens_at_once, hidden_width(model))
    # Statistics and sweeps run in float32 whatever the blocks compute in.
    single = matmul_flops(model.device, torch.float32, job.tokens_at_once, hidden_width(model))
    each_call = call_seconds(model.device)
    all_shapes = model.linear_shapes().values()
    forward = 2.0 * tokens * sum(math.prod(shape) for shape in all_shapes) / rate
    seconds = source_bytes / READ_BYTES_PER_SECOND
    if tokens:
        seconds += forward
        seconds += sum(tokens * columns**2 for columns in _input_widths(shapes)) * 1.3 / single
    for rows, columns in shapes.values():
        for step in job.steps:
            cost = step.cost(rows, columns)
            seconds += cost.flops / single + cost.calls * each_call
    return seconds, forward


def _input_widths(shapes: Mapping[str, tuple[int, int]]) -> list[int]:
    """Widths of the distinct inputs: linears of one parent and width are taken to share theirs."""
    shared = {(name.rpartition(".")[0], columns) for name, (_, columns) in shapes.items()}
    return [columns for _, columns in shared]


def _working_bytes(
    model: ModelView,
    job: Job,
    shapes: Mapping[str, tuple[int, int]],
    tokens: int,
    in_memory: bool,
) -> int:
    """Bytes of the largest block at work: weights, the widest linear's steps, runs inside it."""
    width = element_bytes(model.compute_dtype)
    blocks: dict[str, int] = {path: 0 for path in model.block_paths}
    for name, info in model.source.infos().items():
        path = next((p for p in blocks if name.startswith(p + ".")), None)
        if path is not None:
            blocks[path] += math.prod(info.shape)
    weights = max(blocks.values()) * width
    steps: Sequence[LinearStep] = job.steps
    widest = max(
        9 * rows * columns
        + 4 * columns * columns * len({kind for step in steps for kind in step.needs})
        + max(step.cost(rows, columns).bytes_held for step in steps)
        for rows, columns in shapes.values()
    )
    if not tokens:
        return weights + widest
    each = run_bytes(list(shapes.values()), hidden_width(model), job.tokens_at_once, width)
    inside = max(each, min(job.activation_bytes, tokens // job.tokens_at_once * each))
    return weights + widest + inside + each


def _largest_chunk(model: ModelView) -> int:
    largest = max(info.bytes_stored for info in model.source.infos().values())
    return min(largest, 256 << 20)


def outcome_rows(plan: Plan, seconds: float, ram: int, output_bytes: int) -> list[dict[str, Any]]:
    """Prediction against outcome, one row a quantity."""
    return [
        {"what": "output bytes", "predicted": plan.output_bytes, "measured": output_bytes},
        {"what": "peak RAM bytes", "predicted": plan.peak_ram_bytes, "measured": ram},
        {"what": "seconds", "predicted": plan.seconds, "measured": seconds},
    ]
