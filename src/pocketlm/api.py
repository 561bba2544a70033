"""What users and the CLI call; what measures is written in measuring.py.

Heavy imports happen inside the calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.compression import RecipeLike, compress_model, plan_model, search
from pocketlm.core.errors import ConfigError
from pocketlm.measuring import bench, bisect, compare, evaluate, roofline
from pocketlm.outcome import CompressResult
from pocketlm.recipes import build_recipe, read_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pocketlm.engine.events import Listener
    from pocketlm.engine.export import Export
    from pocketlm.engine.plan import Plan
    from pocketlm.evaluate.verify import Check, VerifyReport
    from pocketlm.models.inspect import Inspection
    from pocketlm.runtime.loaded import Loaded

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
        engine: "transformers", "vllm", "llama.cpp" or "onnxruntime": loads the files in a process
            of its own; its log-probabilities and greedy continuations are compared with ours, and
            the rules that it is known to break on are checked. None: transformers is asked for a
            few logits.
        engine_python: The Python that has transformers, vLLM or ONNX Runtime GenAI; None: what
            POCKETLM_VLLM_PYTHON or POCKETLM_ONNX_PYTHON says, or this one.
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

    def to_form(artifact: Path, output: Path, form: str) -> list[str]:
        """Writes an artifact in an engine's own form; what was lost, as sentences."""
        if form == "onnx":  # of a dense model there are no codes to be kept
            config = json.loads((artifact / "config.json").read_text("utf-8"))
            dtype = None if "quantization_config" in config else "float32"
            made = export(artifact, output, to=form, dtype=dtype, engine_python=engine_python)
            return made.notes
        made = export(artifact, output, to=form)
        return made.notes if any(tensor.error for tensor in made.tensors.values()) else []

    return verify_artifact(
        path, against_source, on_check, found, split=tensor_parallel, export=to_form
    )


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    dtype: str | None = None,
    target: str | None = None,
    engine_python: str | Path | None = None,
) -> Export:
    """Writes a compressed model in another form.

    Args:
        path: An artifact, or what another tool compressed: GPTQ, AWQ, compressed-tensors, GGUF; for
            "gguf" any model, as for `compress`.
        output: Where the exported model goes.
        to: "dense", an ordinary checkpoint with every weight decoded; or a format that keeps the
            codes: "compressed-tensors", "gptq", "gptq_v2", "awq", "mlx", "gguf" (a file for
            llama.cpp in the types that hold the codes); "gguf:Q4_K_M": in those of a mixture;
            "onnx" (a directory for ONNX Runtime GenAI, made by its own builder).
        dtype: Of decoded weights: bfloat16, float16 or float32; None: the artifact's.
        target: The engine that is to load it, such as "vllm"; None: the format's limits only.
        engine_python: For "onnx", the Python that has ONNX Runtime GenAI; None: what
            POCKETLM_ONNX_PYTHON says, or this one.

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
    return export_model(
        path, Path(output).absolute(), to, dtype, target, steps=steps, engine_python=engine_python
    )


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
