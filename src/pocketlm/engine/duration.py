"""Predicts how long a run takes, stage by stage: shapes times rates that are measured briefly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch

from pocketlm.core.columns import kernel_trouble
from pocketlm.core.reconstruct import FORWARDS
from pocketlm.core.state import BlockStep
from pocketlm.core.views import ModelView
from pocketlm.engine.gradients import TOKENS
from pocketlm.engine.grids import pruning_step
from pocketlm.engine.machine import call_seconds, matmul_flops, update_bytes
from pocketlm.engine.memory import hidden_width, input_widths
from pocketlm.engine.options import Job

DISK_BYTES_PER_SECOND = 400e6  # a slow NVMe disk: read and hashed, or copied


def stage_seconds(
    model: ModelView,
    job: Job,
    shapes: Mapping[str, tuple[int, int]],
    samples: int,
    tokens: int,
    sizes: Mapping[str, int],
) -> tuple[dict[str, float], float]:
    """Seconds of each stage, and of one forward pass over the calibration data.

    Args:
        model: The source.
        job: What is to be done.
        shapes: (O, I) of the linears that are compressed.
        samples: Calibration windows.
        tokens: Of all windows; 0 where no step needs data.
        sizes: As `stored_sizes` gives them.

    Returns:
        Stage → seconds, and the seconds of a pass. Embedding the text ("calibrate") is one table
        lookup a token and counts as nothing; gradients, where a step asks, a pass and one back.
    """
    rate = matmul_flops(model.device, model.compute_dtype, job.tokens_at_once, hidden_width(model))
    # Statistics and sweeps run in float32 whatever the blocks compute in; but a GPU sums 16-bit
    # inputs as they are. There few batches are held inside a block: two forwards instead of one.
    single = matmul_flops(model.device, torch.float32, job.tokens_at_once, hidden_width(model))
    on_gpu = model.device.type == "cuda"
    summing = rate if on_gpu else single
    kernels = on_gpu and kernel_trouble() is None
    each_call = call_seconds(model.device)
    moved = update_bytes(model.device, each_call)
    all_shapes = model.linear_shapes().values()
    forward = 2.0 * tokens * sum(math.prod(shape) for shape in all_shapes) / rate
    seconds = sizes["source"] / DISK_BYTES_PER_SECOND
    if tokens:
        seconds += forward * (2 if on_gpu else 1)
        seconds += sum(tokens * columns**2 for columns in input_widths(shapes)) * 1.3 / summing
    for rows, columns in shapes.values():
        for step in job.steps:
            cost = step.cost(rows, columns)
            seconds += cost.flops / single
            if not (kernels and cost.kernel):
                seconds += cost.calls * each_call + cost.bytes_moved / moved
    weights = sum(math.prod(shape) for shape in shapes.values())
    for step in job.steps:
        if step.kind == "block":
            block_step = cast(BlockStep, step)
            seconds += weights * block_step.flops_per_weight(samples, tokens // samples) / rate
        elif step.kind == "fold":
            seconds += forward
    if job.calibrates_inputs:
        seconds += forward
    if job.needs_original:
        seconds += forward
    if (pruning := pruning_step(job.steps)) is not None and pruning.survey is not None:
        learned = FORWARDS * pruning.survey.sequences * (tokens // samples)
        seconds += forward + 2.0 * weights * learned / rate
    walking = 3.0 * forward * min(1.0, TOKENS / max(tokens, 1)) if job.needs_gradients else 0.0
    assembling = sizes["output"] / DISK_BYTES_PER_SECOND
    return {"calibrate": walking, "compress": seconds, "assemble": assembling}, forward
