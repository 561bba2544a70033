"""What users and the CLI call to measure a model: quality, damage by layer, speed, its bound.

Named in `pocketlm.api`, which has the rest. Heavy imports happen inside the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketlm.engine.events import Listener
    from pocketlm.evaluate.results import SpeedReport
    from pocketlm.evaluate.roofline import RooflineReport
    from pocketlm.report.measure import Measurement
    from pocketlm.search.bisect_source import BisectResult


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    text: str | None = None,
    limit: int | None = None,
    seq_len: int = 2048,
    prompt: str | None = None,
    gates: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    task_data: str | Path | None = None,
    items: int | None = None,
    margin: float = 0.01,
    cache_dir: str | Path | None = None,
    speed: bool = True,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> Measurement:
    """Measures a model, and its distance from the original; an artifact keeps the figures.

    Args:
        model: An artifact of pocketlm, or any source.
        against: The original.
        text: What `load_text` takes; None is the evaluation half of the builtin text.
        limit: Windows at most.
        seq_len: Tokens of a window.
        prompt: Answered greedily by both.
        gates: Bounds such as ``kl<0.05``; the far end of the 95 % interval decides. Their outcome
            is in the measurement, whose `raise_for_gates` turns it into an error.
        tasks: Names of lm-eval's tasks, such as ``hellaswag``; needs the extra `eval`.
        task_dir: Directory of YAML files that define them; None: lm-eval's own, from the hub.
        task_data: Directory of the data files that those name; None: beside them.
        items: Of each task at most.
        margin: The loss of a task's score that is tolerated.
        cache_dir: Where answers are kept by content; None: the user's cache.
        speed: Whether tokens per second and memory are measured, each in a child process.
        device: Where to run.
        threads: CPU threads.
        trust_remote_code: Whether code from the checkpoint may run.
        on_event: Called with each event.

    Returns:
        What was found; for an artifact also written to its metrics, page and card.

    Raises:
        PocketLMError: If something cannot be read or measured.
    """
    return _measure(
        [model], against, text=text, limit=limit, seq_len=seq_len, prompt=prompt, gates=gates,
        tasks=tasks, task_dir=task_dir, task_data=task_data, items=items, margin=margin,
        cache_dir=cache_dir, speed=speed, device=device, threads=threads,
        trust_remote_code=trust_remote_code, on_event=on_event,
    )[0]  # fmt: skip


def compare(
    *models: str | Path, against: str | Path | None = None, **options: Any
) -> list[Measurement]:
    """Evaluates several models on the same windows; the first is the original unless named.

    The original is run once.

    Args:
        *models: Artifacts or sources, two or more.
        against: The original; None takes the first model.
        **options: As for `evaluate`.

    Returns:
        One measurement for each compared model.
    """
    original = models[0] if against is None else against
    rest = models[1:] if against is None else models
    return _measure(rest, original, **options)


def _measure(
    models: Sequence[str | Path],
    against: str | Path | None,
    *,
    on_event: Listener | None = None,
    **options: Any,
) -> list[Measurement]:
    from pocketlm.report.measure import Settings, measure

    return measure(models, against, Settings.of(**options), on_event)


def bisect(
    model: str | Path,
    against: str | Path,
    *,
    worst: int = 5,
    text: str | None = None,
    limit: int = 4,
    seq_len: int = 512,
    target: str = "vllm",
    device: str = "auto",
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> BisectResult:
    """Finds the layers of an artifact whose compression costs most KL.

    Args:
        model: An artifact with compressed linears.
        against: What it was made from.
        worst: How many to find.
        text: As for `evaluate`.
        limit: Windows; all of them run as one batch.
        seq_len: Tokens of a window.
        target: Engine that says which linears share one grid, and so are one unit.
        device: Where to run.
        threads: CPU threads.
        cache_dir: Where KLs are kept by content; None: the user's cache.
        trust_remote_code: Whether code from a checkpoint may run.
        on_event: Called with each event.

    Returns:
        The layers, worst first, with the bytes that keeping each would cost, and the artifact's
        recipe with them on its ignore list.

    Raises:
        ConfigError: If nothing in it is compressed, or it has not the original's shapes.
    """
    import torch

    from pocketlm.engine.machine import choose_device
    from pocketlm.search.bisect_source import bisect_source

    if threads is not None:
        torch.set_num_threads(threads)
    return bisect_source(
        model, against, worst=worst, text=text, limit=limit, seq_len=seq_len, target=target,
        device=str(choose_device(device)), trust_remote_code=trust_remote_code,
        directory=None if cache_dir is None else Path(cache_dir), listener=on_event,
    )  # fmt: skip


def bench(path: str | Path, *, device: str = "auto", **options: Any) -> SpeedReport:
    """Measures how fast a model runs, in a process of its own.

    Args:
        path: As for `load`.
        device: Where to run.
        **options: As for `pocketlm.evaluate.speed.measure_here`: batch, prompt_tokens, new_tokens,
            context, runs, dtype, threads, trust_remote_code.

    Returns:
        Tokens per second, latencies and memory, beside what the machine allows.
    """
    from pocketlm.evaluate.speed import measure_speed

    return measure_speed(path, device=device, **options)


def roofline(
    source: str | Path,
    *,
    device: str = "auto",
    batch: int = 1,
    context: int = 1024,
    prompt_tokens: int = 512,
    weight_bits: float | None = None,
    head_bits: float | None = None,
    activation_bits: int = 16,
    cache_bits: int = 16,
    measure: bool = False,
    trust_remote_code: bool = False,
) -> RooflineReport:
    """What a device allows a model, operator by operator; reads its configuration alone.

    Args:
        source: A directory with at least config.json, or what `compress` takes.
        device: A name of `evaluate/devices.json`, or ``auto`` to measure the one that is here.
        batch: Rows.
        context: Positions that a step of decoding reads.
        prompt_tokens: Of the prefill.
        weight_bits: Real bits of a weight of the blocks; None: as stored.
        head_bits: Of the head; None: as stored.
        activation_bits: Of activations.
        cache_bits: Of keys and values.
        measure: Whether the model runs too, to stand beside the prediction; wants ``auto``.
        trust_remote_code: Whether code from the checkpoint may run.

    Raises:
        ConfigError: If a value is out of range, the device unknown, or not the one that is here.
    """
    from pocketlm.evaluate.roofline import Widths
    from pocketlm.evaluate.roofline_source import roofline_source

    widths = Widths(weight_bits, head_bits, activation_bits, cache_bits)
    return roofline_source(
        source, device, widths, batch=batch, context=context, prompt=prompt_tokens,
        measure=measure, trust_remote_code=trust_remote_code,
    )  # fmt: skip
