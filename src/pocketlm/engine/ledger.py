"""Every tensor of the source accounted for: compressed, folded, kept or dropped; no times."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pocketlm.calibration.record import CalibrationAccount
from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import ActivationSpec
from pocketlm.core.stored import WeightSpec
from pocketlm.engine.health import InputHealth

Action = Literal[
    "quantized", "pruned", "factorised", "folded", "cut", "merged", "rotated", "kept", "dropped"
]


class Entry(BaseModel):
    """What became of one tensor of the source.

    Attributes:
        action: What was done.
        reason: Why.
        shape: As in the source.
        bits: Stored bits, scales and zero points counted.
        spec: In what form the values are stored, where compressed.
        sparsity: The share of weights that were pruned; None: the step prunes nothing.
        rank: Of its two factors; None: it has none.
        activations: How the linear's inputs are rounded; None: not at all.
        error: Relative squared error of the linear's output, |(W - Q)X|² / |WX|², measured on the
            calibration inputs; of the weight itself where there are none.
        inputs: What calibration data reached the linear, where compressed with data.
        notes: Fallbacks and approximations, as sentences.
        outputs: The tensors that stand for it in the artifact.
        end: Which it is of embedding and head, where it is one of them and compressed; a tied one
            is an embedding.
        copy_of: The tensor of the source that this head was tied to, where it is stored apart.
    """

    model_config = ConfigDict(extra="forbid")

    action: Action
    reason: str
    shape: tuple[int, ...]
    bits: int
    spec: WeightSpec | None = None
    sparsity: float | None = None
    rank: int | None = None
    activations: ActivationSpec | None = None
    error: float | None = None
    inputs: InputHealth | None = None
    notes: list[str] = Field(default_factory=list)
    outputs: list[str] = Field(default_factory=list)
    end: Literal["embedding", "head"] | None = None
    copy_of: str | None = None


class StageAccount(BaseModel):
    """A stage of a recipe that made a smaller model before the last stage.

    Attributes:
        method: The step's.
        options: As the recipe has them.
        summary: What was done, as a sentence.
        config: Keys of config.json that changed.
        parameters_before: Weights of its source, tied ones once.
        parameters_after: Weights of what it made.
        notes: What a user must be told, as sentences.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    summary: str
    config: dict[str, Any] = Field(default_factory=dict)
    parameters_before: int
    parameters_after: int
    notes: list[str] = Field(default_factory=list)


class Ledger(BaseModel):
    """The accounts of one artifact.

    Attributes:
        source: Where the model came from, as the user named it.
        format: "compressed-tensors" or "pocketlm".
        fingerprint: What the bytes depend on: source, recipe, calibration, versions, device.
        calibration: What was calibrated on; None where no step needed data.
        tensors: Tensor of the source → what became of it.
        files: File of the artifact → SHA-256.
        warnings: What the whole run has to tell, as sentences.
        stages: What made the source smaller before; the tensors are those of the last stage's
            source, as `pocketlm/stages/` has them for the earlier ones.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    format: str
    fingerprint: dict[str, Any]
    calibration: CalibrationAccount | None = None
    tensors: dict[str, Entry] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    stages: list[StageAccount] = Field(default_factory=list)

    def compressed(self) -> dict[str, Entry]:
        """What is compressed, embedding and head too: tensor of the source → what became of it."""
        return {name: entry for name, entry in self.tensors.items() if entry.spec is not None}

    def bits_per_weight(self) -> float:
        """Real bits per weight of the compressed linears, without embedding and head."""
        chosen = [entry for entry in self.compressed().values() if entry.end is None]
        weights = sum(_count(entry.shape) for entry in chosen)
        return sum(entry.bits for entry in chosen) / weights if weights else 0.0

    def calibration_warnings(self) -> list[str]:
        """Which linears little or no calibration data reached, experts mostly, as sentences."""
        seen = {name: e.inputs for name, e in self.tensors.items() if e.inputs is not None}
        none = [name for name, inputs in seen.items() if not inputs.tokens]
        few = sorted((i.tokens, i.columns, name) for name, i in seen.items() if i.few)
        found: list[str] = []
        if none:
            found.append(
                f"no calibration token reached {len(none)} linears, such as {none[0]}: "
                "they were compressed without data. More --samples may help."
            )
        if few:
            tokens, columns, name = few[0]
            found.append(
                f"{len(few)} linears were reached by fewer calibration tokens than they have "
                f"inputs ({name}: {tokens} for {columns}). More --samples may help."
            )
        return found

    def require_complete(self, names: list[str]) -> None:
        """Checks that every tensor of the source is explained.

        Raises:
            ArtifactError: Naming the first tensor that is not.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ArtifactError(
                f"the ledger does not explain {len(missing)} tensors of the source.",
                where=missing[0],
                remedy="This is a defect of pocketlm; please report it with the model's name.",
            )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
