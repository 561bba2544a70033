"""Embedding and head compressed: counted, stored, resumed, and loaded everywhere alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests
from tests.unit.formats.artifacts import build_llama

from pocketlm import catalog
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.engine import ends as engine_ends
from pocketlm.engine.compress import run_job
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.options import Job
from pocketlm.engine.plan import make_plan
from pocketlm.evaluate import verify_logits
from pocketlm.evaluate.verify import verify_artifact
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.hf import plain_logits
from pocketlm.models import open_model, runtime_model
from pocketlm.recipes import END_STEPS
from pocketlm.runtime.load import load

EMBED, HEAD = "model.embed_tokens", "lm_head"
INT8 = QuantSpec(bits=8, group_size=None)
INT4 = QuantSpec(bits=4, group_size=32)
TOKENS = list(range(3, 35))


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify runs plain transformers in this process; chunks are of 64 rows."""
    monkeypatch.setattr(
        verify_logits, "_logits_elsewhere", lambda path, tokens, _: plain_logits(path, tokens)
    )
    monkeypatch.setattr(runtime_model, "load_tokenizer", lambda *args, **kwargs: None)
    monkeypatch.setattr(engine_ends, "CHUNK_WEIGHTS", 64 * 64)


@pytest.fixture(scope="session", params=["tied", "apart"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / request.param
    build_llama(torch.bfloat16, tied=request.param == "tied").save_pretrained(path)
    return path


def compress(source: Path, output: Path, overrides: dict[str, QuantSpec], target="transformers"):
    recipe = Recipe.parse(
        {
            "steps": ["rtn"],
            "weights": INT4.model_dump(),
            "overrides": {name: spec.model_dump() for name, spec in overrides.items()},
        }
    )
    model = open_model(source)
    grids = choose_grids(
        model.linear_shapes(), model.stores_transposed, recipe, target, model.ends()
    )
    job = Job(
        source=str(source),
        recipe=recipe,
        steps=(catalog.build_step("rtn", {}),),
        output=output,
        work_dir=output.with_name(f"{output.name}.work"),
        target=target,
        tokens_at_once=64,
        activation_bytes=1 << 30,
        end_steps=tuple(catalog.build_step(step.method, step.options) for step in END_STEPS),
    )
    plan = make_plan(model, job, grids, 1, 32)
    return plan, run_job(model, job, grids, None, plan, restart=False, listener=None)


CHOICES = {
    "both": {EMBED: INT8, HEAD: INT8},
    "embedding": {"embed_tokens": INT4},
    "head": {HEAD: INT8},
    "other": {EMBED: QuantSpec(bits=3, group_size=32), HEAD: QuantSpec(bits=4, group_size=64, type="nf")},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_written_is_counted_and_runs_alike(
    tmp_path: Path, source: Path, choice: str
) -> None:
    out, overrides = tmp_path / "out", CHOICES[choice]
    plan, _ = compress(source, out, overrides)
    stored = load_file(out / "model.safetensors")
    written = sum(t.numel() * t.element_size() for t in stored.values())
    assert plan.output_bytes == written
    ledger = ledger_of(out)
    bits = sum(8 * t.numel() * t.element_size() for n, t in stored.items() if "shape" not in n)
    assert bits == sum(entry.bits for entry in ledger.tensors.values())

    tied, config = source.name == "tied", json.loads((out / "config.json").read_text())
    once = tied and choice in ("both", "embedding")
    assert config["tie_word_embeddings"] == once
    assert any(name.startswith("lm_head.") for name in stored) != once
    assert ("model.embed_tokens.weight" in stored) == (choice == "head")
    assert config["quantization_config"]["quant_method"] == (
        "compressed-tensors" if choice == "head" else "pocketlm"
    )
    said = " ".join(note for entry in ledger.tensors.values() for note in entry.notes)
    assert ("stored once" in said) == once
    assert ("count twice" in said) == (tied and not once)

    view = open_model(out, allow_compressed=True)
    ours_TV = view_logits(view, TOKENS)
    assert torch.equal(ours_TV, plain_logits(out, TOKENS)), "transformers computes it"
    original_TV = view_logits(open_model(source), TOKENS)
    assert 0 < float((ours_TV - original_TV).norm() / original_TV.norm()) < 0.5
    model, _ = load(out, dtype=torch.float32)
    with torch.no_grad():
        packed_TV = model(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(packed_TV, ours_TV, rtol=1e-4, atol=1e-6)
    report = verify_artifact(out, source)
    assert not report.failures(), report.failures()
