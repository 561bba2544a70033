"""Everything a report shows, typed; its JSON is the artifact's ``pocketlm/metrics.json``.

Parts that were not measured are None or empty and the page says so: nothing is made up.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pocketlm.calibration.health import TextHealth
from pocketlm.core.errors import ArtifactError
from pocketlm.evaluate.results import QualityReport, Result, SpeedReport, TaskResult
from pocketlm.formats.shards import write_file

FOLDER = "pocketlm"  # beside the weights
METRICS = "metrics.json"


class SizePart(Result):
    """One slice of the weights on disk.

    Attributes:
        name: Such as ``linears: codes`` or ``embedding``.
        original_bytes: In the source; 0 for what only the result has (scales).
        compressed_bytes: In the result.
    """

    name: str
    original_bytes: int
    compressed_bytes: int


class LinearResult(Result):
    """One compressed linear.

    Attributes:
        name: Module path.
        bits: Real bits of a weight, scales counted.
        error: Relative squared error of the output on the calibration data, |(W - Q)X|² / |WX|².
    """

    name: str
    bits: float | None
    error: float | None


class InputRow(Result):
    """What calibration data reached the linears of one kind, all blocks and experts together.

    Attributes:
        kind: Path inside the block; experts share one.
        linears: How many.
        columns: Their inputs.
        tokens_least: Of the linear that the fewest reached.
        tokens_most: Of the one that the most reached.
        rank_least: Least effective rank of the inputs (`Hessian.effective_rank`), of those that
            tokens reached; None without Hessians.
        rank_most: The largest.
        dead_columns: Of all these linears, inputs that were always zero.
        constant_columns: Inputs that always had one other value.
        few: Linears with fewer tokens than inputs.
        unreached: Linears without any token.
    """

    kind: str
    linears: int
    columns: int
    tokens_least: int
    tokens_most: int
    rank_least: float | None
    rank_most: float | None
    dead_columns: int
    constant_columns: int
    few: int
    unreached: int


class LedgerRow(Result):
    """What happened to one tensor of the source."""

    tensor: str
    action: str
    reason: str
    bits: float | None = None
    outputs: tuple[str, ...] = ()


class StageResult(Result):
    """How far a model is from the original after a stage of its recipe.

    Attributes:
        name: The stage's methods, or ``original``.
        log_perplexity: Nats a token, on a few windows (report/waterfall.py).
        kl: From the original, mean nats a token.
    """

    name: str
    log_perplexity: float
    kl: float


class Timing(Result):
    """A stage and its wall time."""

    stage: str
    seconds: float


class Prediction(Result):
    """What `plan` said and what came.

    Attributes:
        name: Such as ``peak RAM``.
        unit: ``bytes``, ``seconds`` or ``bits``.
        predicted: Before the work.
        actual: After it; None where it was not measured.
    """

    name: str
    unit: str
    predicted: float
    actual: float | None


class Answer(Result):
    """The same prompt answered by both, greedily."""

    prompt: str
    original: str
    compressed: str


class Remark(Result):
    """A warning or a fallback.

    Attributes:
        kind: One word, such as ``warning``, ``fallback`` or ``left out``.
        where: Module path, file or stage; empty for the whole run.
        text: A sentence.
    """

    kind: str
    where: str
    text: str


class ReportData(Result):
    """One compression run with its measurements.

    Attributes:
        title: The model's name.
        source: Where it came from, revision included.
        created: ISO date and time.
        version: Of pocketlm.
        machine: Hardware and operating system, in words.
        command: What makes the same again; None from Python.
        scheme: Such as ``W4A16 symmetric, group 64``.
        methods: Of the recipe's steps, in order.
        calibration: Text, hash, windows and seed, in words.
        text: What the calibration windows are made of.
        inputs: What reached the linears, by kind.
        recipe_yaml: The resolved recipe.
        parameters: Of the model, tied weights once.
        original_bytes: Of the source's weights on disk.
        compressed_bytes: Of the result's.
        original_bits: Average bits of a weight in the source.
        linear_bits: Average real bits of the compressed linears, scales counted.
        sizes: The breakdown, largest first.
        quality: Of the result, against the original where there was one.
        original_speed: Of the original.
        speed: Of the result.
        answers: Sample prompts.
        tasks: Of the result beside the original, on the same items.
        linears: Each compressed linear, in order.
        timings: Of the stages, in order.
        predictions: Plan against outcome.
        remarks: Warnings and fallbacks.
        ledger: Every tensor of the source.
        stages: The original and what each stage left, where a recipe has stages.
    """

    title: str
    source: str
    created: str
    version: str
    machine: str
    command: str | None = None
    scheme: str
    methods: tuple[str, ...]
    calibration: str
    recipe_yaml: str
    parameters: int
    original_bytes: int
    compressed_bytes: int
    original_bits: float
    linear_bits: float | None
    sizes: tuple[SizePart, ...] = ()
    quality: QualityReport | None = None
    original_speed: SpeedReport | None = None
    speed: SpeedReport | None = None
    answers: tuple[Answer, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    linears: tuple[LinearResult, ...] = ()
    timings: tuple[Timing, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    remarks: tuple[Remark, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    text: TextHealth | None = None
    inputs: tuple[InputRow, ...] = ()
    stages: tuple[StageResult, ...] = ()


def write_metrics(artifact_dir: str | Path, data: ReportData) -> Path:
    """Writes ``pocketlm/metrics.json``, whole or not at all.

    Args:
        artifact_dir: The artifact.
        data: What was measured.

    Returns:
        The file.
    """
    path = Path(artifact_dir) / FOLDER / METRICS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (data.model_dump_json(indent=1) + "\n").encode())
    return path


def read_metrics(artifact_dir: str | Path) -> ReportData:
    """Reads what `write_metrics` wrote.

    Raises:
        ArtifactError: If it is missing or of another make.
    """
    path = Path(artifact_dir) / FOLDER / METRICS
    try:
        return ReportData.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"cannot be read: {error.strerror}.",
            where=str(path),
            remedy="Give the output directory of a compression.",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"'{key}': {first['msg']}.", where=str(path), remedy="Evaluate the artifact again."
        ) from error
