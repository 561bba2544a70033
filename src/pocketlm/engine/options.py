"""Everything a run is told besides the model, the recipe's steps and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pocketlm.core.spec import Recipe
from pocketlm.core.state import LinearStep, Step
from pocketlm.core.stats import GradientSize
from pocketlm.engine.ledger import StageAccount


@dataclass(frozen=True)
class Job:
    """One compression, resolved: nothing in it is a default any more.

    Attributes:
        source: As the user named it.
        recipe: What is asked for.
        steps: The recipe's steps with their options checked, in order.
        output: Directory of the artifact.
        work_dir: Directory of the unfinished run.
        target: Engine whose rules the artifact must keep.
        tokens_at_once: Tokens of one batch of calibration.
        activation_bytes: Memory that calibration activations may take.
        dtype: Dtype of the tensors that are kept; None: as in the source.
        warnings: What the whole run has to tell; goes into the ledger.
        fingerprint: What the bytes depend on.
        seed: Of steps that draw at random.
        whole: The recipe of all stages; None: this one is all.
        stages: What made the source smaller before.
        stage_ledgers: File of the artifact → the ledger of an earlier stage.
        end_steps: What compresses embedding and head, without data.
    """

    source: str
    recipe: Recipe
    steps: tuple[Step, ...]
    output: Path
    work_dir: Path
    target: str
    tokens_at_once: int
    activation_bytes: int
    dtype: torch.dtype | None = None
    warnings: tuple[str, ...] = ()
    fingerprint: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    whole: Recipe | None = None
    stages: tuple[StageAccount, ...] = ()
    stage_ledgers: Mapping[str, bytes] = field(default_factory=dict)
    end_steps: tuple[LinearStep, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether a step, or a static rounding of inputs, needs calibration data."""
        stats = any(step.needs for step in self.steps)
        return stats or self.needs_original or self.calibrates_inputs

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """In which plain scales are stored: GGUF has float16 alone; None: by the weights' dtype."""
        return torch.float16 if self.target == "llama.cpp" else None

    @property
    def needs_gradients(self) -> bool:
        """Whether a step asks for the loss's gradient in the weights."""
        return any(kind is GradientSize for step in self.steps for kind in step.needs)

    @property
    def calibrates_inputs(self) -> bool:
        """Whether inputs are rounded with static scales, which are found on calibration data."""
        activations = self.recipe.activations
        return activations is not None and not activations.dynamic

    @property
    def needs_original(self) -> bool:
        """Whether a step compares with the original model's activations."""
        paired = any(kind.paired for step in self.steps for kind in step.needs)
        return paired or any(step.kind == "block" for step in self.steps)
