"""Tiny models on disk with calibration text, and the API called on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.models.families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pocketlm
from pocketlm.api import CompressResult

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with jade gloves. "
BLOCKS = 4


def save(family: str, path: Path, **changes: object) -> Path:
    """A random model of a family with a tokenizer of bytes."""
    build(family, **{"num_hidden_layers": BLOCKS, **changes}).save_pretrained(path)
    letters = sorted(set(TEXT))
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = TEXT.split()
    order = torch.randint(0, len(words), (600,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in order))
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model's directory by family, made once."""
    root, known = tmp_path_factory.mktemp("models"), {}

    def get(family: str, **changes: object) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in known:
            known[key] = save(family, root / str(len(known)), **changes)
        return known[key]

    return get


@pytest.fixture
def damage_by_stage() -> None:
    """Has the report tell what each stage costs."""


@pytest.fixture(autouse=True)
def _no_damage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluating every stage for the report takes a third of a tiny run: a test has to ask."""
    if "damage_by_stage" not in request.fixturenames:
        monkeypatch.setattr("pocketlm.report.waterfall.measure_stages", lambda *_, **__: ())


@pytest.fixture
def compress(text_file: Path) -> Callable[..., CompressResult]:
    def run(source: Path, output: Path, *steps: Any, **options: Any) -> CompressResult:
        recipe = {"steps": list(steps), "ignore": ["lm_head"]}
        settings = {"calibration": str(text_file), "samples": 4, "seq_len": 32, **options}
        return pocketlm.compress(source, recipe, output, **settings)

    return run


def plain(path: Path) -> PreTrainedModel:
    """The artifact as plain transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """float32 logits [T, V] of one sequence."""
    with torch.no_grad():
        return model(torch.arange(3, 27)[None]).logits[0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)
