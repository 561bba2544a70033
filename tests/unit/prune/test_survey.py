"""What a survey finds, against plain transformers on the whole model."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.unit.prune.conftest import BLOCKS, plain

from pocketlm.calibration.windows import Windows
from pocketlm.engine import gradients
from pocketlm.engine.journal import Journal
from pocketlm.engine.streamed_survey import StreamedSurvey
from pocketlm.models import open_model
from pocketlm.models.opening import reopen
from pocketlm.models.outline import ModelOutline

TOKENS_NT = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def survey(saved, tmp_path: Path):
    def make(family: str, *, activation_bytes: int = 1 << 20) -> StreamedSurvey:
        model = open_model(saved(family))
        windows = Windows(TOKENS_NT, "random", "0" * 64, False, 0)
        journal = Journal(tmp_path / "work", {}, restart=False)
        return StreamedSurvey(
            model, ModelOutline(model), windows, journal, 32, activation_bytes, lambda *_: None
        )

    return make


def loss(model) -> torch.Tensor:
    logits_NTV = model(TOKENS_NT, use_cache=False).logits
    return F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), TOKENS_NT[:, 1:].flatten())


def test_removal_losses(survey, saved) -> None:
    found_L = survey("llama").removal_losses()
    for index in range(BLOCKS):
        model = plain(saved("llama"))
        del model.model.layers[index]
        with torch.no_grad():
            assert abs(float(loss(model)) - float(found_L[index])) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_gradients(survey, saved, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward block by block, logits a few at a time, gives autograd's on the whole model."""
    monkeypatch.setattr(gradients, "LOGIT_BYTES", 7 * 4 * gradients.LOGIT_COPIES * 96)

    def look(index, block, sums):
        return {name: gradient.clone() for name, gradient in sums.items()}

    found = {n: g for one in survey(family).gradients(look) for n, g in one.items()}
    model = plain(saved(family))
    loss(model).backward()
    inner = {"gpt2": "h.1.mlp.c_proj"}.get(family, "layers.1.self_attn.o_proj")
    name = next(name for name in found if name.endswith(inner))
    expected = next(p.grad for n, p in model.named_parameters() if n.endswith(f"{inner}.weight"))
    expected = expected.T if family == "gpt2" else expected
    torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_gradients_are_root_mean_squares_over_sequences(
    saved, tmp_path: Path, family: str
) -> None:
    gradients.keep_gradients(open_model(saved(family)), TOKENS_NT, tmp_path / "g", lambda *_: None)
    model, sums = plain(saved(family)), 0.0
    inner = {"gpt2": "h.1.mlp.c_proj"}.get(family, "layers.1.self_attn.o_proj")
    weight = next(p for n, p in model.named_parameters() if n.endswith(f"{inner}.weight"))
    for tokens_T in TOKENS_NT:
        logits_TV = model(tokens_T[None], use_cache=False).logits[0]
        one = F.cross_entropy(logits_TV[:-1], tokens_T[1:])
        sums = sums + torch.autograd.grad(one, weight)[0].square()
    expected = (sums / len(TOKENS_NT)).sqrt()
    kept = gradients.read_gradients(tmp_path / "g", 1)
    found = next(value for name, value in kept.items() if name.endswith(inner))
    expected = expected.T if family == "gpt2" else expected
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("activation_bytes", [1 << 20, 1])
def test_visit_sees_every_block_and_token(survey, activation_bytes: int) -> None:
    """In memory and on disk; a look that reads nothing does not stop the stream."""

    def look(visit):
        if visit.index == 1:
            return {}
        tokens, groups = 0, set()
        for before_BTD, after_BTD in visit.run(lambda group, inputs: groups.add(group)):
            tokens += before_BTD[..., 0].numel()
            assert before_BTD.shape == after_BTD.shape
        return {"tokens": torch.tensor(tokens), "groups": torch.tensor(len(groups))}

    found = survey("llama", activation_bytes=activation_bytes).visit(look)
    assert [int(one.get("tokens", -1)) for one in found] == [48, -1, 48, 48]
    assert int(found[0]["groups"]) == 4


def test_distance_of_itself(survey) -> None:
    made = survey("llama")
    assert abs(made.distance(made.outline.keep_blocks(range(BLOCKS))) - 1) < 1e-6
    assert made.distance(made.outline.keep_blocks([0, 3])) < 0.99


def test_a_changed_model_is_freed_at_once(saved) -> None:
    """A search opens hundreds of them: none may wait for the garbage collector."""
    model = open_model(saved("llama"))
    changed = reopen(model, ModelOutline(model).keep_blocks([0, 3]))
    changed.begin(TOKENS_NT[:1])
    embedding = weakref.ref(changed.skeleton.model.get_input_embeddings().weight)
    gc.disable()
    try:
        del changed
        assert embedding() is None
    finally:
        gc.enable()
