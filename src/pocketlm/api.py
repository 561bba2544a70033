"""What users and the CLI call. Heavy imports happen inside the calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.compression import (
    SEARCH_MINUTES,
    CompressResult,
    RecipeLike,
    compress_model,
    plan_model,
    search_model,
)
from pocketlm.core.spec import QuantSpec
from pocketlm.recipes import build_recipe, read_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pocketlm.engine.events import Listener
    from pocketlm.engine.export import Export
    from pocketlm.engine.plan import Plan
    from pocketlm.evaluate.verify import VerifyReport
    from pocketlm.models.inspect import Inspection
    from pocketlm.report.measure import Measurement
    from pocketlm.search.results import SearchResult

__all__ = [
    "CompressResult", "build_recipe", "compare", "compress", "evaluate", "generate", "inspect",
    "load", "plan", "read_recipe", "report", "search", "verify",
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
        source: A directory, hub id, `.gguf` file, `smollm2-135m`, or a model in memory.
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

    model = open_model(source, trust_remote_code=trust_remote_code, revision=revision)
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


def search(
    source: str | Path | PreTrainedModel,
    recipe: RecipeLike = "w4a16",
    *,
    bits: float | None = None,
    size: int | None = None,
    candidates: Sequence[QuantSpec] | None = None,
    ignore: tuple[str, ...] = (),
    target: str = "transformers",
    calibration: str = "builtin",
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    search_minutes: float = SEARCH_MINUTES,
    search_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_event: Listener | None = None,
) -> SearchResult:
    """Finds where bits matter: the best grid for each layer within a budget, and the frontier.

    Args:
        source: As for `compress`.
        recipe: Gives the steps, the group size and symmetry, and overrides, which are kept.
        bits: Budget: average real bits of the compressed linears, a float (3.5, 4.0).
        size: Budget: bytes of the weight files. Without either, the frontier alone.
        candidates: Grids to choose from; None for the recipe's at 2, 3, 4, 5, 6 and 8 bits.
        ignore: Further patterns of linears to keep.
        target: Engine that must load the result.
        calibration: The text that damage is measured on, as for `compress`.
        seed: Of its windows.
        device: Where to run.
        dtype: Of the tensors that are kept.
        threads: CPU threads.
        search_minutes: What measuring may take beyond one KL a unit, which is always measured.
        search_dir: Where findings are kept for every later budget; None: the user's cache.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        on_event: Called with each event.

    Returns:
        The sensitivity table, the frontier and, with a budget, an ordinary recipe.

    Raises:
        BudgetError: If the budget is below what is possible; says the smallest that is.
        PocketLMError: If something cannot be read or measured.
    """
    return search_model(
        source, recipe, bits=bits, size=size, candidates=candidates, ignore=ignore, target=target,
        calibration=calibration, seed=seed, device=device, dtype=dtype, threads=threads,
        search_minutes=search_minutes, search_dir=search_dir,
        trust_remote_code=trust_remote_code, revision=revision, on_event=on_event,
    )  # fmt: skip


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
        [model], against, text=text, limit=limit, seq_len=seq_len, prompt=prompt, speed=speed,
        device=device, threads=threads, trust_remote_code=trust_remote_code,
        on_event=on_event,
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
    device: str = "auto",
    on_event: Listener | None = None,
    **settings: Any,
) -> list[Measurement]:
    from pocketlm.engine.machine import choose_device
    from pocketlm.report.measure import Settings, measure

    chosen = Settings(device=str(choose_device(device)), **settings)
    return measure(models, against, chosen, on_event)


def verify(path: str | Path, against_source: str | Path | None = None) -> VerifyReport:
    """Reloads an artifact's written files and checks all that its ledger claims.

    Args:
        path: The artifact.
        against_source: The original, to compare tensor names with.

    Returns:
        Named checks, each passed, failed or not checked.
    """
    from pocketlm.evaluate.verify import verify_artifact

    return verify_artifact(path, against_source)


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    dtype: str | None = None,
) -> Export:
    """Writes an artifact in another form.

    Args:
        path: The artifact; for "gguf" any model, as for `compress`.
        output: Where the exported model goes.
        to: The form: "dense", an ordinary checkpoint with every weight decoded; "gguf", a file for
            llama.cpp in the types that hold the codes; "gguf:Q4_K_M", in those of a mixture.
        dtype: Of decoded weights: bfloat16, float16 or float32; None: the artifact's.

    Returns:
        What was made: bytes and multiplications before and after.

    Raises:
        PocketLMError: If there is no such form, or the artifact cannot be read.
    """
    from pocketlm.catalog import build_step
    from pocketlm.engine.export import export as export_artifact
    from pocketlm.recipes import END_STEPS

    steps = [build_step(step.method, step.options) for step in END_STEPS]
    return export_artifact(Path(path), Path(output).absolute(), to, dtype, steps=steps)


def report(path: str | Path) -> Path:
    """Renders report.html and the model card anew from an artifact's metrics.

    Returns:
        The page.
    """
    from pocketlm.report.build import render

    return render(Path(path))


def load(
    path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an artifact to run from its packed weights, or an original.

    Args:
        path: An artifact, or what `compress` takes as a source.
        device: Where to run.
        dtype: Of the activations; None lets the machine decide.

    Returns:
        A transformers model and its tokenizer.
    """
    from pocketlm.runtime.load import load as load_runtime

    return load_runtime(path, device=device, dtype=dtype)


def generate(path: str | Path, prompt: str, **options: Any) -> Any:
    """Answers one prompt.

    Args:
        path: As for `load`.
        prompt: Goes through the chat template where the tokenizer has one.
        **options: As for `pocketlm.runtime.generate.generate`.

    Returns:
        Text, tokens and timings.
    """
    from pocketlm.runtime.generate import generate as generate_text

    model, tokenizer = load(path)
    return generate_text(model, tokenizer, prompt, **options)
