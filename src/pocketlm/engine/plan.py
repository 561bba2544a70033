"""Predicts a run before a weight is read: bytes, memory, disk, time; refuses what cannot work.

Shapes come from the checkpoint's headers, rates from half a second of measurement.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from pocketlm.calibration.health import TextHealth
from pocketlm.core.errors import BudgetError
from pocketlm.core.state import Step
from pocketlm.core.views import ModelView
from pocketlm.engine.duration import stage_seconds
from pocketlm.engine.gradients import TOKENS
from pocketlm.engine.grids import Grids, grid_text, linear_bits, scale_dtype_for
from pocketlm.engine.machine import (
    activation_device,
    available_ram_bytes,
    resident_bytes,
    total_vram_bytes,
)
from pocketlm.engine.memory import (
    hidden_bytes,
    hidden_width,
    input_widths,
    learning_bytes,
    run_bytes,
    runs_budget,
    shapes_by_block,
)
from pocketlm.engine.options import Job
from pocketlm.engine.order import passes
from pocketlm.formats import format_for
from pocketlm.formats.safetensors_header import element_bytes

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
        inputs: How their inputs are rounded, such as ``int8-token``; None: not at all.
        grids: Grid in words → how many of them have it.
        sparsity: Share of zeros or N:M, such as ``2:4``; None: nothing is pruned.
        ends: Embedding and head where they are compressed → grid in words.
        source_bytes: Of the source's tensors.
        output_bytes: Of the artifact's tensors.
        bits_per_weight: Real bits of the compressed linears.
        samples: Calibration windows; 0 where no step needs data.
        seq_len: Tokens of each.
        tokens_per_expert: If all experts are used alike; None for a dense model or without data.
        text: What the calibration windows are made of; None where they are not drawn yet.
        activations: "memory" or "disk".
        peak_ram_bytes: Of the process.
        peak_vram_bytes: On the GPU.
        disk_transient_bytes: Needed beside the output while the run lives.
        resume_seconds: What recomputing activations costs at worst after a kill.
        seconds: Of the whole run.
        stages: Of its stages, in order.
        kept: Linears that keep their precision, and why.
        notes: What was changed about the grids.
        warnings: What else is not as it was asked for.
        smaller: What each stage that makes a smaller model will do, as sentences.
        proof: What runs of the target engine say of such files (`formats/proofs.py`); None: the
            target is none of the engines that were run.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    method: str
    format: str
    target: str
    device: str
    blocks: int
    linears: int
    inputs: str | None = None
    grids: dict[str, int]
    sparsity: str | None = None
    ends: dict[str, str] = Field(default_factory=dict)
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    samples: int
    seq_len: int
    tokens_per_expert: float | None
    text: TextHealth | None = None
    activations: str
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_transient_bytes: int
    resume_seconds: float
    seconds: float
    stages: dict[str, float]
    kept: dict[str, str]
    notes: dict[str, str]
    warnings: list[str] = Field(default_factory=list)
    smaller: list[str] = Field(default_factory=list)
    proof: str | None = None


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
    sizes = stored_sizes(model, grids, job.dtype)
    stages, forward = stage_seconds(model, job, shapes, samples, tokens, sizes)
    in_memory = boundary_bytes(model, job, tokens) <= job.activation_bytes
    working = _working_bytes(model, job, shapes, tokens)
    on_gpu = model.device.type == "cuda"
    waiting = boundary_bytes(model, job, tokens) if in_memory else 0
    there = activation_device(model.device, waiting).type == "cuda"
    host_hidden = 0 if there else waiting
    host = resident_bytes() + FIXED_BYTES + host_hidden + _largest_chunk(model)
    if on_gpu:  # the next block is read, and the last one written, while one is in work
        host += 2 * _largest_block(model) * element_bytes(model.dtype)
    gradients = 0  # on disk, in bfloat16
    if job.needs_gradients:
        gradients = 2 * sum(math.prod(shape) for shape in model.linear_shapes().values())
        host += (len(model.block_paths) + 1) * hidden_bytes(model, TOKENS)
    floats = job.dtype or model.dtype
    bits = sum(
        linear_bits(grids.stored(name, shape, floats), shape, grids.inputs.get(name))
        for name, shape in shapes.items()
    )
    return Plan(
        source=job.source,
        method=" → ".join(step.method for step in job.recipe.steps),
        format=grids.format_name,
        target=job.target,
        device=str(model.device),
        blocks=len(model.block_paths),
        linears=len(shapes),
        inputs=", ".join(dict.fromkeys(spec.name for spec in grids.inputs.values())) or None,
        grids=dict(Counter(_forms(grids, shapes, floats)).most_common()),
        sparsity=None if grids.sparsity is None else grids.sparsity.name,
        ends={name: grid_text(spec) for name, spec in grids.ends.items()},
        source_bytes=sizes["source"],
        output_bytes=sizes["output"],
        bits_per_weight=bits / sum(math.prod(shape) for shape in shapes.values()),
        samples=samples if tokens else 0,
        seq_len=seq_len if tokens else 0,
        tokens_per_expert=_tokens_per_expert(model.config, tokens),
        activations="memory" if in_memory else "disk",
        peak_ram_bytes=host if on_gpu else host + working,
        peak_vram_bytes=working + (waiting if there else 0) if on_gpu else 0,
        disk_transient_bytes=sizes["blocks"]
        + sizes["ends"]
        + gradients
        + (0 if in_memory else (4 if job.needs_original else 2) * hidden_bytes(model, tokens)),
        resume_seconds=forward if in_memory else 0.0,
        seconds=sum(stages.values()),
        stages=stages,
        kept=dict(grids.kept),
        notes=dict(grids.notes),
    )


def _tokens_per_expert(config: Mapping[str, Any], tokens: int) -> float | None:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((config[key] for key in keys if config.get(key)), None)
    if experts is None or not tokens:
        return None
    return tokens * config.get("num_experts_per_tok", 1) / experts


def boundary_bytes(model: ModelView, job: Job, tokens: int) -> int:
    """Bytes of what waits at a block's boundary: one stream, or also the original's two sides."""
    return (3 if job.needs_original else 1) * hidden_bytes(model, tokens)


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


def stored_sizes(model: ModelView, grids: Grids, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of tensors, everything counted.

    Args:
        model: The source.
        grids: The fitted grids.
        dtype: Of the tensors that are kept; None: as in the source.

    Returns:
        "source", "output" (the artifact), "blocks" (the compressed linears in it) and "ends" (the
        compressed embedding and head in it).
    """
    section = format_for(grids.format_name)
    shapes = model.linear_shapes()
    totals = {"source": 0, "output": 0, "blocks": 0, "ends": 0}
    infos, compressed = model.source.infos(), set[str]()
    for end in model.ends():
        for name in (end.name, end.tied_name):
            if name is None or name not in grids.ends:
                continue
            scale = scale_dtype_for(infos[end.tensor].dtype)
            totals["ends"] += section.stored_bytes(grids.ends[name], end.shape, scale)
            compressed.add(f"{name}.weight")
    totals["output"] += totals["ends"]
    for name, info in infos.items():
        totals["source"] += info.bytes_stored
        if name in model.repeated or name in compressed:
            continue
        module = name.removesuffix(".weight")
        if module in grids.specs and module in shapes:
            scale = scale_dtype_for(info.dtype)
            form = grids.stored(module, shapes[module], dtype or info.dtype)
            stored = section.stored_bytes(form, shapes[module], scale, grids.inputs.get(module))
            totals["blocks"] += stored
            totals["output"] += stored
        elif dtype is not None and info.dtype.is_floating_point:
            totals["output"] += math.prod(info.shape) * element_bytes(dtype)
        else:
            totals["output"] += info.bytes_stored
    return totals


def _forms(
    grids: Grids, shapes: Mapping[str, tuple[int, int]], floats: torch.dtype
) -> Iterator[str]:
    """What is asked of each linear in words: its grid, its factors."""
    for name, shape in shapes.items():
        asked = grids.stored(name, shape, floats) if grids.factoring else grids.specs[name]
        yield grid_text(asked)


def _working_bytes(
    model: ModelView,
    job: Job,
    shapes: Mapping[str, tuple[int, int]],
    tokens: int,
) -> int:
    """Bytes of the largest block at work: weights, the widest linear's steps, runs inside it."""
    width = element_bytes(model.compute_dtype)
    weights = _largest_block(model) * width
    steps: Sequence[Step] = job.steps
    widest = max(
        9 * rows * columns
        + 4 * columns * columns * len({kind for step in steps for kind in step.needs})
        + max((s.cost(rows, columns).bytes_held for s in steps if s.kind != "block"), default=0)
        for rows, columns in shapes.values()
    )
    if any(one.at_once for one in passes(steps)):  # statistics of all groups of a block at once
        widest += max(
            sum(4 * columns**2 for columns in input_widths(inside))
            for inside in shapes_by_block(model, shapes)
        )
    if not tokens:
        return weights + widest
    each = run_bytes(list(shapes.values()), hidden_width(model), job.tokens_at_once, width)
    budget = runs_budget(model, job.activation_bytes)
    inside = max(each, min(budget, tokens // job.tokens_at_once * each))
    learning = learning_bytes(model, steps, shapes, job.tokens_at_once)
    if learning and model.device.type == "cuda":  # inputs and targets stay there
        learning += min(job.activation_bytes, 2 * hidden_bytes(model, tokens))
    return weights + max(widest + inside, learning) + each


def _largest_block(model: ModelView) -> int:
    """Weights of the largest block."""
    blocks: dict[str, int] = {path: 0 for path in model.block_paths}
    for name, info in model.source.infos().items():
        path = next((p for p in blocks if name.startswith(p + ".")), None)
        if path is not None:
            blocks[path] += math.prod(info.shape)
    return max(blocks.values())


def _largest_chunk(model: ModelView) -> int:
    largest = max(info.bytes_stored for info in model.source.infos().values())
    return min(largest, 256 << 20)
