"""Embedding and head as something to choose for, within a size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.search.conftest import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.plan import stored_sizes
from pocketlm.evaluate.divergence import score_tokens
from pocketlm.models import open_model
from pocketlm.search.budget import Budget
from pocketlm.search.ends import EndRows, end_units
from pocketlm.search.run import Question, run_search

GRIDS = tuple(QuantSpec(bits=bits, group_size=32) for bits in (3, 4, 8))
RECIPE = Recipe.parse({"steps": ["clip", "rtn"], "weights": {"bits": 4, "group_size": 32}})


@pytest.fixture(
    scope="module",
    params=[True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["tied", "apart"],
)
def large_vocabulary(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thirds of its weights are embedding and head."""
    path = tmp_path_factory.mktemp("ends") / "llama"
    torch.manual_seed(0)
    settings = {**SMALL, "vocab_size": 1600, "tie_word_embeddings": request.param}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the searches of this module measure; test_run.py shows that it may be shared."""
    return tmp_path_factory.mktemp("findings")


def search(source: Path, windows: Windows, root: Path, target="transformers", **changes):
    model = open_model(source)
    sizes = sum(info.bytes_stored for info in model.source.infos().values())
    question = Question(
        recipe=changes.pop("recipe", RECIPE), target=target,
        budget=changes.pop("budget", Budget(file_bytes=int(sizes * 0.2))),
        candidates=GRIDS, dtype=None, limit_seconds=3600.0,
    )  # fmt: skip
    return model, question, run_search(model, windows, question, root)


def test_a_size_that_needs_them_compresses_them(large_vocabulary, windows, findings):
    model, question, found = search(large_vocabulary, windows, findings)
    assert found.recipe is not None
    assert found.chosen is not None
    ends = model.ends()
    assert len(ends) == (1 if model.tied else 2)
    assert {"model.embed_tokens", *(end.name for end in ends)} <= set(found.recipe.overrides)
    grids = choose_grids(
        model.linear_shapes(), False, found.recipe, question.target, ends=model.ends()
    )
    assert set(grids.ends) == {end.name for end in ends}
    assert grids.format_name == "pocketlm"
    written = stored_sizes(model, grids, None)["output"]
    assert written <= found.chosen.file_bytes <= question.budget.file_bytes
    assert any("import pocketlm.hf" in note for note in found.notes)
    again = search(large_vocabulary, windows, findings)[2]
    assert again.recipe == found.recipe


def test_their_damage_is_the_kl_of_the_changed_model(large_vocabulary, windows, findings):
    """Against the original's own class with the decoded rows put in place."""
    model, _, found = search(large_vocabulary, windows, findings)
    original = LlamaForCausalLM.from_pretrained(large_vocabulary)
    tokens = windows.tokens_NT
    for end in model.ends():
        unit = next(unit for unit in found.units if unit.name == end.name)
        c = next(i for i, spec in enumerate(unit.grids) if spec is not None and unit.measured[i])
        changed = LlamaForCausalLM.from_pretrained(large_vocabulary)
        rows = EndRows(model, end, unit.grids[c])(0, end.shape[0])
        with torch.no_grad():
            changed.get_submodule(end.name).weight.copy_(rows)
            base, other = (m(tokens).logits[:, :-1].flatten(0, 1) for m in (original, changed))
        kl = score_tokens(other, tokens[:, 1:].flatten(), base).kl
        assert unit.damages[c] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert unit.grids[-1] is None
        assert unit.damages[-1] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": Budget(bits=4.5)}, None),
        ({"recipe": RECIPE.model_copy(update={"ignore": ("embed_tokens", "lm_head")})}, "ignored"),
    ],
)
def test_else_they_keep_their_precision(large_vocabulary, windows, findings, changes, said):
    if said is not None:
        changes = {**changes, "budget": Budget(file_bytes=10**8)}
    _, _, found = search(large_vocabulary, windows, findings, **changes)
    assert not {"model.embed_tokens", "lm_head"} & set(found.recipe.overrides)
    assert not any(unit.name in ("model.embed_tokens", "lm_head") for unit in found.units)
    assert said is None or any(said in note for note in found.notes)


def test_targets_get_what_they_load(large_vocabulary):
    model = open_model(large_vocabulary)
    for target, names in (("vllm", ["lm_head"]), ("vllm-cpu", [])):
        grids = choose_grids(model.linear_shapes(), False, RECIPE, target, ends=model.ends())
        units = end_units(model, RECIPE, grids, GRIDS, target, None)
        assert [unit.name for unit in units] == ([] if model.tied else names)
