"""What users and the CLI call. Heavy imports happen inside the calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.compression import RecipeLike, compress_model, plan_model, search
from pocketlm.core.errors import ConfigError
from pocketlm.outcome import CompressResult
from pocketlm.recipes import build_recipe, read_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pocketlm.engine.events import Listener
    from pocketlm.engine.export import Export
    from pocketlm.engine.plan import Plan
    from pocketlm.evaluate.results import SpeedReport
    from pocketlm.evaluate.roofline import RooflineReport
    from pocketlm.evaluate.verify import Check, VerifyReport
    from pocketlm.models.inspect import Inspection
    from pocketlm.report.measure import Measurement
    from pocketlm.runtime.loaded import Loaded
    from pocketlm.search.bisect_source import BisectResult

__all__ = [
    "CompressResult", "bench", "bisect", "build_recipe", "compare", "compress", "evaluate",
    "export", "generate", "inspect", "load", "plan", "read_recipe", "report", "roofline", "search",
    "verify",
]  # fmt: skip


def inspect(
    source: str | Path | PreTrainedModel,
    *,
    probe: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Inspection:
    """Looks at a model without compressing it: blocks, groups, folds, parameters, bytes.

    Args:
        source: A directory, hub id, `.gguf` file, `smollm2-135m`, or a model in memory; compressed
            ones too.
        probe: Whether folds are proved in float64 (reads one block of each kind).
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.

    Returns:
        What was found.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is no causal language model.
    """
    from pocketlm.models import open_model
    from pocketlm.models.inspect import inspect_model

    model = open_model(
        source,
        trust_remote_code=trust_remote_code,
        revision=revision,
        allow_compressed=True,
    )
    return inspect_model(model, probe=probe)


def plan(
    source: str | Path | PreTrainedModel, recipe: RecipeLike = "w4a16", **options: Any
) -> Plan:
    """Predicts a compression: output bytes, memory, disk and seconds.

    Args:
        source: As for `inspect`.
        recipe: A preset, a YAML file, plain data or a Recipe.
        **options: As for `compress`.

    Returns:
        The prediction.

    Raises:
        ConfigError: If the recipe cannot work.
        UnsupportedLayer: If the target cannot load a layer.
    """
    return plan_model(source, recipe, **options)


def compress(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike = "w4a16",
    output: str | Path = "out",
    *,
    resume: bool = True,
    on_event: Listener | None = None,
    **options: Any,
) -> CompressResult:
    """Compresses a model into an ordinary Hugging Face directory; goes on by itself if stopped.

    Args:
        source: A directory, hub id, `.gguf` file, `smollm2-135m`, or a model in memory.
        recipe: A preset, a YAML file, plain data or a Recipe.
        output: Where the artifact goes.
        resume: False forgets an earlier attempt and replaces an artifact in the way.
        on_event: Called with each event.
        **options: `calibration` (builtin, self, a file, hf:org/name), `samples`, `seq_len`, `seed`,
            `ignore`, `target`, `device`, `dtype`, `threads`, `work_dir`,
            `activation_budget_bytes`, `trust_remote_code`, `revision`; a budget, `bits` (a float)
            or `size`, with `candidates`, `search_minutes` and `search_dir` as for `search`.

    Returns:
        What was made, with the prediction.

    Raises:
        PocketLMError: Any of its kinds; nothing half-written looks whole.
    """
    return compress_model(source, recipe, output, resume=resume, on_event=on_event, **options)


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


def verify(
    path: str | Path,
    against_source: str | Path | None = None,
    *,
    engine: str | None = None,
    engine_python: str | Path | None = None,
    engine_path: str | Path | None = None,
    tensor_parallel: int = 1,
    on_check: Callable[[Check], None] | None = None,
) -> VerifyReport:
    """Reloads an artifact's written files and checks all that its ledger claims.

    Args:
        path: The artifact; with an engine also an export, another tool's model or a GGUF file.
        against_source: The original, to compare tensor names with.
        engine: "transformers", "vllm" or "llama.cpp": loads the files in a process of its own; its
            log-probabilities and greedy continuations are compared with ours, and the rules that it
            is known to break on are checked. None: transformers is asked for a few logits.
        engine_python: The Python that has transformers or vLLM; None: what POCKETLM_VLLM_PYTHON
            says, or this one.
        engine_path: The directory that has node-llama-cpp; None: what POCKETLM_LLAMA_CPP says, or
            the current one.
        tensor_parallel: Over how many GPUs the engine is to split it.
        on_check: Called after each check.

    Returns:
        Named checks, each passed, failed or not checked.

    Raises:
        ArtifactError: If nothing of an artifact is there.
        ConfigError: If the engine is unknown, or not installed there.
    """
    from pocketlm.evaluate.engines.find import find_engine
    from pocketlm.evaluate.verify import verify_artifact

    if engine is None:
        if engine_python is not None or engine_path is not None or tensor_parallel > 1:
            raise ConfigError("it needs --engine.", where="--engine-…, --tensor-parallel")
        return verify_artifact(path, against_source, on_check)
    place = None if engine_path is None else Path(engine_path)
    found = find_engine(engine, engine_python, place)
    return verify_artifact(
        path, against_source, on_check, found, split=tensor_parallel, to_gguf=_to_gguf
    )


def _to_gguf(path: Path, file: Path) -> list[str]:
    """Writes an artifact as a GGUF file; what was lost, as sentences."""
    made = export(path, file, to="gguf")
    return made.notes if any(tensor.error for tensor in made.tensors.values()) else []


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    dtype: str | None = None,
    target: str | None = None,
) -> Export:
    """Writes a compressed model in another form.

    Args:
        path: An artifact, or what another tool compressed: GPTQ, AWQ, compressed-tensors, GGUF; for
            "gguf" any model, as for `compress`.
        output: Where the exported model goes.
        to: "dense", an ordinary checkpoint with every weight decoded; or a format that keeps the
            codes: "compressed-tensors", "gptq", "gptq_v2", "awq", "mlx", "gguf" (a file for
            llama.cpp in the types that hold the codes); "gguf:Q4_K_M": in those of a mixture.
        dtype: Of decoded weights: bfloat16, float16 or float32; None: the artifact's.
        target: The engine that is to load it, such as "vllm"; None: the format's limits only.

    Returns:
        What was made: bytes and multiplications before and after, and what was lost.

    Raises:
        PocketLMError: If there is no such form, the model cannot be read, or the form or target
            cannot take it.
    """
    from pocketlm.catalog import build_step
    from pocketlm.engine.export import export as export_model
    from pocketlm.recipes import END_STEPS

    steps = [build_step(step.method, step.options) for step in END_STEPS]
    return export_model(path, Path(output).absolute(), to, dtype, target, steps=steps)


def report(path: str | Path) -> Path:
    """Renders report.html and the model card anew from an artifact's metrics.

    Returns:
        The page.
    """
    from pocketlm.report.build import render

    return render(Path(path))


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Loads an artifact to run from its packed weights, or an original.

    Args:
        path: An artifact, or what `compress` takes as a source.
        device: Where to run.
        dtype: Of the activations; None lets the machine decide.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub model.

    Returns:
        A transformers model and its tokenizer, as a pair that also generates.
    """
    from pocketlm.runtime.load import load as load_runtime
    from pocketlm.runtime.loaded import Loaded

    return Loaded(
        *load_runtime(
            path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision
        )
    )


def generate(path: str | Path, prompt: str, **options: Any) -> Any:
    """Answers one prompt.

    Args:
        path: As for `load`.
        prompt: Goes through the chat template where the tokenizer has one.
        **options: As for `pocketlm.runtime.generate.generate`.

    Returns:
        Text, tokens and timings.
    """
    return load(path).generate(prompt, **options)


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
