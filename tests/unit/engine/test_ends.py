"""Embedding and head compressed: counted, stored, resumed, and loaded everywhere alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests
from tests.unit.formats.artifacts import build_llama, round_to_nearest
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from pocketlm import catalog
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import SCHEMES, QuantSpec, Recipe
from pocketlm.engine import ends as engine_ends
from pocketlm.engine.compress import run_job
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.journal import Journal
from pocketlm.engine.options import Job
from pocketlm.engine.plan import make_plan
from pocketlm.evaluate.verify import verify_artifact
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.hf import plain_logits
from pocketlm.models import open_model, runtime_model
from pocketlm.recipes import END_STEPS
from pocketlm.runtime.embedding import PackedEmbedding
from pocketlm.runtime.load import load

EMBED, HEAD = "model.embed_tokens", "lm_head"
INT8 = QuantSpec(bits=8, group_size=None)
INT4 = QuantSpec(bits=4, group_size=32)
TOKENS = list(range(3, 35))


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are of 64 rows."""
    monkeypatch.setattr(runtime_model, "load_tokenizer", lambda *args, **kwargs: None)
    monkeypatch.setattr(engine_ends, "CHUNK_WEIGHTS", 64 * 64)


@pytest.fixture(scope="session", params=["tied", pytest.param("apart", marks=pytest.mark.slow)])
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
        model.linear_shapes(), model.stores_transposed, recipe, target, ends=model.ends()
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
    "other": {
        EMBED: QuantSpec(bits=3, group_size=32),
        HEAD: QuantSpec(bits=4, group_size=64, type="nf"),
    },
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


def test_a_stopped_run_gives_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are of 64 rows of 320: a run is stopped inside the embedding."""
    compress(source, tmp_path / "whole", CHOICES["other"])
    left, write = [2 + 4], Journal.write_block

    def stop(journal: Journal, *arguments) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(journal, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_block", stop)
        with pytest.raises(Killed):
            compress(source, tmp_path / "parts", CHOICES["other"])
    compress(source, tmp_path / "parts", CHOICES["other"])
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_rows_are_alike_in_chunks_and_whole(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, tmp_path / "chunks", CHOICES["other"])
    monkeypatch.setattr(engine_ends, "CHUNK_WEIGHTS", 1 << 30)
    compress(source, tmp_path / "whole", CHOICES["other"])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("chunks", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("overrides", "target", "said"),
    [
        ({EMBED: INT8}, "vllm", "does not load the format pocketlm|no compressed embedding"),
        ({HEAD: INT8}, "vllm-cpu", "no compressed head"),
        ({HEAD: QuantSpec(bits=4, group_size=32, symmetric=False)}, "transformers", "zero points"),
        ({HEAD: SCHEMES["NVFP4"]}, "transformers", "scales that rows share"),
    ],
)
def test_what_an_engine_cannot_load_is_refused(
    tmp_path: Path, source: Path, overrides: dict[str, QuantSpec], target: str, said: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=said):
        compress(source, tmp_path / "out", overrides, target)


def test_a_pattern_that_spells_neither_leaves_them() -> None:
    recipe = Recipe.parse({"steps": ["rtn"], "overrides": {"re:.*": INT8, "Linear": INT8}})
    assert recipe.spec_for_end(EMBED) is None
    named = recipe.model_copy(update={"overrides": {"embed_tokens": INT8}})
    assert named.spec_for_end(EMBED) == INT8
    assert named.model_copy(update={"ignore": (EMBED,)}).spec_for_end(EMBED) is None


def test_a_scaled_embedding_stays_one() -> None:
    """Gemma multiplies what it looks up."""
    layer = Gemma3TextScaledWordEmbedding(40, 32, padding_idx=39, embed_scale=3.0)
    packed = round_to_nearest(layer.weight.detach(), QuantSpec(bits=5, group_size=16))
    ids = torch.tensor([[39, 4, 4], [0, 38, 39]])
    found = PackedEmbedding(packed, layer, dtype=torch.float32, device=torch.device("cpu"))(ids)
    assert torch.equal(found, packed.dequantize()[ids] * 3.0)
