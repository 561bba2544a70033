"""Predicts a transform: bytes of the smaller model, and what looking at the original takes."""

from __future__ import annotations

import math

import torch

from pocketlm.core.changes import Changes
from pocketlm.engine.artifact import kept_info
from pocketlm.engine.duration import DISK_BYTES_PER_SECOND
from pocketlm.engine.machine import matmul_flops, resident_bytes
from pocketlm.engine.memory import hidden_bytes, hidden_width, run_bytes
from pocketlm.engine.options import Job
from pocketlm.engine.plan import FIXED_BYTES, Plan
from pocketlm.formats import dense, pocketlm
from pocketlm.formats.capabilities import check_shortcuts
from pocketlm.formats.safetensors_header import element_bytes
from pocketlm.models import Model

OVERHEAD = 1.5  # of a pass over its matrix products: attention, norms, statistics


def plan_transform(
    model: Model, smaller: Model, job: Job, changes: Changes, samples: int, seq_len: int
) -> Plan:
    """Predicts a stage.

    Args:
        model: The original.
        smaller: A view of what will be made, of the right sizes.
        job: What is to be done.
        changes: What will be done; of the sizes alone.
        samples: Calibration windows; 0 where none are needed.
        seq_len: Tokens of each.

    Returns:
        The plan.

    Raises:
        UnsupportedLayer: If the target loads no such model.
    """
    own = format_of(changes, job.target)
    tokens = samples * seq_len
    shapes = list(model.linear_shapes().values())
    rate = matmul_flops(model.device, model.compute_dtype, job.tokens_at_once, hidden_width(model))
    looks = 2 if changes.shortcuts else 1  # at the block as it is, and as it will be
    forward = looks * OVERHEAD * 2.0 * tokens * sum(map(math.prod, shapes)) / rate
    infos = model.source.infos()
    source_bytes = sum(info.bytes_stored for info in infos.values())
    written = [kept_info(info, job.dtype) for info in smaller.source.infos().values()]
    output_bytes = sum(info.bytes_stored for info in written)
    weights = sum(math.prod(info.shape) for info in written)
    hidden = hidden_bytes(model, tokens)
    in_memory = hidden <= job.activation_bytes
    width = element_bytes(model.compute_dtype)
    block = sum(math.prod(i.shape) for n, i in infos.items() if n.startswith(model.block_paths[0]))
    working = width * block + run_bytes(shapes, hidden_width(model), job.tokens_at_once, width)
    largest = 3 * max(math.prod(info.shape) for info in written) * 8  # an edit in float64
    on_gpu = model.device.type == "cuda"
    host = resident_bytes() + FIXED_BYTES + largest + (hidden if in_memory else 0)
    if changes.shortcuts:  # a basis in float64 for each block, twice while they are written down
        host += 16 * len(model.block_paths) * hidden_width(model) * hidden_width(smaller)
    seconds = forward + (source_bytes + output_bytes) / DISK_BYTES_PER_SECOND
    return Plan(
        source=job.source,
        method=" → ".join(step.method for step in job.recipe.steps),
        format=own,
        target=job.target,
        device=str(model.device),
        blocks=len(model.block_paths),
        linears=len(shapes),
        grids={},
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        bits_per_weight=8 * output_bytes / max(weights, 1),
        samples=samples,
        seq_len=seq_len if tokens else 0,
        tokens_per_expert=None,
        activations="memory" if in_memory else "disk",
        peak_ram_bytes=host if on_gpu else host + working,
        peak_vram_bytes=working if on_gpu else 0,
        disk_transient_bytes=0 if in_memory else 2 * hidden,
        resume_seconds=forward if in_memory else 0.0,
        seconds=seconds,
        stages={"calibrate": seconds, "assemble": 0.0},
        kept={},
        notes={},
        smaller=[changes.summary],
        warnings=list(changes.notes),
    )


def format_of(changes: Changes, target: str) -> str:
    """The format that holds a smaller model: an ordinary checkpoint, or ours.

    Raises:
        UnsupportedLayer: If the target does not load it.
    """
    if not changes.shortcuts:
        return dense.NAME
    check_shortcuts(target, next(iter(changes.shortcuts)))
    return pocketlm.NAME


def weights_of(model: Model) -> int:
    """Weights of a model, tied ones once."""
    infos = model.source.infos()
    return sum(torch.Size(infos[n].shape).numel() for n in infos if n not in model.repeated)
