"""A basis for each block: the same function until it is cut, and what runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.unit.models.families import build
from tests.unit.prune.conftest import logits, plain

import pocketlm
import pocketlm.hf
from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import PocketLMError, UnsupportedLayer, UnsupportedModel
from pocketlm.engine.journal import Journal
from pocketlm.engine.streamed_survey import BlockVisit, StreamedSurvey
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.models import open_model
from pocketlm.models.opening import reopen
from pocketlm.models.outline import ModelOutline
from pocketlm.models.rotation import Rotation
from pocketlm.prune.slicegpt import Slicegpt

APART = {"method": "slicegpt", "rotation": "block"}


def basis(kept: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:, :kept]


def shortcuts(path: Path) -> list[str]:
    section = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    return list(section["shortcuts"])


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "qwen3"])
def test_zero_ratio_is_the_same_function(saved, compress, tmp_path: Path, family: str) -> None:
    """Turned whole, in float32, by both roads that run it, bit for bit alike."""
    source = saved(family)
    compress(source, tmp_path / "out", {**APART, "ratio": 0.0})
    ours = logits(pocketlm.load(tmp_path / "out", dtype=torch.float32)[0])
    torch.testing.assert_close(ours, logits(plain(source)), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, logits(plain(tmp_path / "out")))
    assert shortcuts(tmp_path / "out") == [f"model.layers.{i}.shortcut" for i in range(4)]
    turned = plain(tmp_path / "out").model.layers[2].shortcut.weight
    assert (turned - torch.eye(32)).abs().max() > 0.1


def test_next_blocks_see_what_the_sliced_ones_give(saved, tmp_path: Path, monkeypatch) -> None:
    """The survey's stream, written in 32 columns, is the sliced model's in 24."""
    last: list[torch.Tensor] = []
    run = BlockVisit.run

    def watched(self: BlockVisit, *args, **options):
        for before, after in run(self, *args, **options):
            last[:] = [after]
            yield before, after

    monkeypatch.setattr(BlockVisit, "run", watched)
    model = open_model(saved("llama"), compute_dtype=torch.float64)
    tokens_NT = torch.arange(3, 35)[None]
    windows = Windows(tokens_NT, "numbers", "0" * 64, False, 0)
    journal = Journal(tmp_path / "work", {}, restart=False)
    survey = StreamedSurvey(
        model, ModelOutline(model), windows, journal, 32, 1 << 20, lambda *_: None
    )
    step = Slicegpt(rotation="block", hidden=24)
    measured = step.measure(survey)
    sliced = reopen(model, step.changes(survey.outline, measured))
    found = view_logits(sliced, tokens_NT[0].tolist())
    basis_DK = measured[-1]["head_basis"]
    expected = model.logits(model.finish(last[0] @ basis_DK @ basis_DK.T)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = view_logits(model, tokens_NT[0].tolist())
    assert (found - whole).abs().max() > 0.1, "nothing was cut"


@pytest.mark.parametrize(
    "activation_bytes",
    [pytest.param(1 << 30, marks=pytest.mark.slow), 1000],
    ids=["memory", "disk"],
)
def test_stopped_run_gives_the_same_bytes(
    saved, compress, tmp_path: Path, monkeypatch, activation_bytes: int
) -> None:
    """Sliced blocks before the stop are made again from the bases that were found."""
    step, options = {**APART, "ratio": 0.25}, {"activation_budget_bytes": activation_bytes}
    compress(saved("llama"), tmp_path / "whole", step, **options)
    write, looked = Journal.write_block, []

    def stop(self, index: int, *args) -> None:
        write(self, index, *args)
        looked.append(index)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(saved("llama"), tmp_path / "parts", step, **options)
    compress(saved("llama"), tmp_path / "parts", step, **options)
    assert looked == [0, 1, 2, 3]
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_quantized_afterwards(saved, compress, text_file: Path, tmp_path: Path) -> None:
    """In one recipe or in two runs: matrices keep their dtype, are counted, and are told of."""
    source, grid = saved("llama"), {"bits": 8, "group_size": None}
    one = {"steps": [{**APART, "hidden": 32}, "rtn"], "weights": grid, "ignore": ["lm_head"]}
    options = {"calibration": str(text_file), "samples": 2, "seq_len": 32}
    result = pocketlm.compress(source, one, tmp_path / "one", **options)
    compress(source, tmp_path / "first", {**APART, "hidden": 32})
    two = {"steps": ["rtn"], "weights": grid, "ignore": ["lm_head"]}
    pocketlm.compress(tmp_path / "first", two, tmp_path / "second")
    for path in (tmp_path / "one", tmp_path / "second"):
        ledger = json.loads((path / "pocketlm" / "ledger.json").read_text("utf-8"))
        entry = ledger["tensors"]["model.layers.1.shortcut.weight"]
        assert (entry["action"], entry["bits"]) == ("kept", 32 * 32 * 32)
        assert "next" in entry["reason"]
        assert any("import pocketlm.hf" in warning for warning in ledger["warnings"])
        assert len(shortcuts(path)) == 4
        ours = logits(pocketlm.load(path, dtype=torch.float32)[0])
        torch.testing.assert_close(ours, logits(plain(path)))
        torch.testing.assert_close(ours, logits(plain(source)), rtol=0.1, atol=0.1)
    assert result.plan.format == "pocketlm"


def test_plan_tells_what_loads_it(saved, text_file: Path) -> None:
    options = {"calibration": str(text_file), "samples": 2, "seq_len": 32}
    plan = pocketlm.plan(saved("llama"), {"steps": [{**APART, "ratio": 0.25}]}, **options)
    assert plan.format == "pocketlm"
    assert any("4 matrices of 24 × 24" in warning for warning in plan.warnings)
    with pytest.raises(UnsupportedLayer, match="vllm"):
        pocketlm.plan(saved("llama"), {"steps": [APART]}, target="vllm", **options)


def test_refused_afterwards(saved, compress, tmp_path: Path) -> None:
    """No dense export, no engine's own format, and nothing that cuts it once more."""
    compress(saved("llama"), tmp_path / "out", {**APART, "ratio": 0.25})
    for form in ("dense", "gptq"):
        with pytest.raises(UnsupportedLayer, match="no ordinary checkpoint"):
            pocketlm.export(tmp_path / "out", tmp_path / "dense", to=form)
    assert not (tmp_path / "dense").exists()
    with pytest.raises(UnsupportedLayer, match="vllm"):
        pocketlm.plan(tmp_path / "out", "w4a16", target="vllm")
    with pytest.raises(UnsupportedModel, match="once more"):
        compress(tmp_path / "out", tmp_path / "again", {"method": "depth", "blocks": 1})


def test_steps_that_cut_come_before(saved, compress, tmp_path: Path) -> None:
    compress(saved("llama"), tmp_path / "out", {"method": "depth", "blocks": 1}, APART)
    assert len(shortcuts(tmp_path / "out")) == 3


@pytest.mark.parametrize("family", ["gpt2", "olmo2", "mixtral"])
def test_refused_where_norms_do_not_allow_it(family: str) -> None:
    outline = ModelOutline(open_model(build(family)))
    with pytest.raises(PocketLMError) as caught:
        outline.rotate([basis(32, seed) for seed in range(4)])
    assert caught.value.where


def test_wrong_matrix_is_not_proved(monkeypatch) -> None:
    """Q Q'ᵀ in place of its transpose: the proof must see it."""
    outline = ModelOutline(open_model(build("llama")))
    right = Rotation._shortcuts

    def wrong(self, matrices):
        return right(self, [matrix.T for matrix in matrices])

    monkeypatch.setattr(Rotation, "_shortcuts", wrong)
    with pytest.raises(UnsupportedLayer, match=r"layers\.0"):
        outline.rotate([basis(32, seed) for seed in range(4)])


def test_scaled_residuals_are_refused_by_proof() -> None:
    """x + 0.5 f(x): what the last linear gives is not what the block adds."""
    outline = ModelOutline(open_model(build("granite", residual_multiplier=0.5)))
    outline.rotate([basis(32, 0)])
    with pytest.raises(UnsupportedLayer, match="turned stream"):
        outline.rotate([basis(32, seed) for seed in range(4)])
