"""What a compression made: the answer that its caller gets, and the report beside the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pocketlm.engine.ledger import Ledger
    from pocketlm.engine.plan import Plan
    from pocketlm.models.adapter import Model
    from pocketlm.report.data import StageResult
    from pocketlm.stages import Reduced


class CompressResult(BaseModel):
    """What `compress` made.

    Attributes:
        output: The artifact's directory.
        report: Its report.html.
        already_done: Whether the very same artifact was there before.
        output_bytes: Of its tensors.
        bits_per_weight: Real bits of the compressed linears.
        mean_error: Mean relative output error of the linears on the calibration data.
        inputs: What calibration data reached the linears, by kind (`report.data.InputRow`).
        seconds: Of this attempt, by stage.
        peak_ram_bytes: Of this process; None where the system does not tell.
        plan: What was predicted.
        warnings: What a user must be told.
    """

    model_config = ConfigDict(extra="forbid")

    output: Path
    report: Path
    already_done: bool
    output_bytes: int
    bits_per_weight: float
    mean_error: float | None
    inputs: list[Any]
    seconds: dict[str, float]
    peak_ram_bytes: int | None
    plan: Any
    warnings: list[str]


def result_of(
    output: Path, ledger: Ledger, plan: Plan, seconds: dict[str, float], *, already_done: bool
) -> CompressResult:
    """The answer for an artifact that is in place.

    Args:
        output: Its directory.
        ledger: Of it.
        plan: What was predicted.
        seconds: Of this attempt, by stage.
        already_done: Whether it was there before.
    """
    from pocketlm.evaluate.memory import peak_memory_bytes
    from pocketlm.report.ledger import input_rows

    return CompressResult(
        output=output,
        report=output / "pocketlm" / "report.html",
        already_done=already_done,
        output_bytes=sum(entry.bits for entry in ledger.tensors.values()) // 8,
        bits_per_weight=ledger.bits_per_weight() or plan.bits_per_weight,
        mean_error=_mean_error(ledger),
        inputs=list(input_rows(ledger)),
        seconds=seconds,
        peak_ram_bytes=peak_memory_bytes(),
        plan=plan,
        warnings=ledger.warnings,
    )


def write_report(result: CompressResult, original: Model, reduced: Reduced | None = None) -> None:
    """Writes metrics, page and card; of a recipe with stages also what each of them costs.

    Args:
        result: Of the compression.
        original: The first source.
        reduced: What the stages left; None where there were none.
    """
    from pocketlm.models.stream import SafetensorsSource
    from pocketlm.report.build import write_run_report

    damage: tuple[StageResult, ...] = ()
    if reduced is not None:
        from pocketlm.report.waterfall import measure_stages

        names = [account.method for account in reduced.accounts]
        stages = list(zip(names, reduced.places, strict=True))
        if reduced.rest is not None:
            last = " → ".join(step.method for step in reduced.rest.steps)
            stages.append((last, result.output))
        damage = measure_stages(original, stages, trust_remote_code=reduced.trust_remote_code)
    written = dict(SafetensorsSource(result.output).infos())
    write_run_report(
        result.output,
        original,
        written,
        result.plan,
        result.seconds,
        result.peak_ram_bytes,
        damage,
    )


def _mean_error(ledger: Ledger) -> float | None:
    errors = [entry.error for entry in ledger.tensors.values() if entry.error is not None]
    return sum(errors) / len(errors) if errors else None
