"""A tiny real model on disk, and a way to compress it without the API."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm import catalog
from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import Recipe
from pocketlm.engine.compress import run_job
from pocketlm.engine.events import Listener
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.options import Job
from pocketlm.engine.plan import Plan, make_plan
from pocketlm.engine.runner import Outcome
from pocketlm.models import open_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


class Compress:
    """Compresses the tiny model; keeps what tests vary as arguments."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._plan: Plan | None = None

    def windows(self, seed: int = 0) -> Windows:
        """What it calibrates on."""
        generator = torch.Generator().manual_seed(seed)
        tokens_NT = torch.randint(0, 300, (6, 32), generator=generator)
        return Windows(tokens_NT, "random", "0" * 64, False, seed)

    def __call__(
        self,
        output: Path,
        *,
        steps: tuple[object, ...] = ("gptq",),
        bits: int = 4,
        weights: dict[str, object] | None = None,
        activations: dict[str, object] | None = None,
        target: str = "transformers",
        activation_bytes: int = 1 << 30,
        restart: bool = False,
        listener: Listener | None = None,
        seed: int = 0,
        floats: bool = False,
    ) -> Outcome | None:
        recipe = Recipe.parse(
            {
                "steps": list(steps),
                "weights": None if floats else weights or {"bits": bits, "group_size": 32},
                "ignore": ["lm_head"],
                "activations": activations,
            }
        )
        model = open_model(self.source)
        steps_built = tuple(catalog.build_step(s.method, s.options) for s in recipe.steps)
        shapes = model.linear_shapes()
        grids = choose_grids(shapes, model.stores_transposed, recipe, target, steps_built)
        job = Job(
            source=str(self.source),
            recipe=recipe,
            steps=steps_built,
            output=output,
            work_dir=output.with_name(f"{output.name}.work"),
            target=target,
            tokens_at_once=64,
            activation_bytes=activation_bytes,
        )
        windows = None
        if job.needs_data:
            windows = self.windows(seed)
        if self._plan is None or weights is not None:  # it measures the machine: once will do
            self._plan = make_plan(model, job, grids, 6, 32)
        return run_job(model, job, grids, windows, self._plan, restart=restart, listener=listener)


@pytest.fixture(scope="session")
def compress(tiny: Path) -> Compress:
    return Compress(tiny)


@pytest.fixture(scope="session")
def compress_from() -> type[Compress]:
    """Compresses another model: called with its directory."""
    return Compress
