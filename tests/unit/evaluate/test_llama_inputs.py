"""Inputs as llama.cpp rounds them: the gguf package's Q8_0, and Q8_K value by value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.unit.engine.test_export_gguf import bpe_tokenizer, saved
from tests.unit.models.families import build

from pocketlm import api
from pocketlm.core.spec import ActivationSpec
from pocketlm.evaluate.engines.ask import Answer
from pocketlm.evaluate.engines.compare import our_hidden, our_logits
from pocketlm.evaluate.engines.find import Engine
from pocketlm.evaluate.engines.llama_inputs import LlamaInput, llama_inputs
from pocketlm.evaluate.verify_engine import KL_LIMITS, EngineRun
from pocketlm.models import open_model
from pocketlm.models.adapter import Model

GROUP = ActivationSpec(granularity="group", group_size=32)
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_blocks_of_32() -> None:
    x_TI = drawn(5, 256)
    x_TI[2, :32] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(x_TI.numpy(), kind), kind)
    for weight in ("Q8_0", "Q4_1", "IQ4_NL"):
        assert torch.equal(LlamaInput(GROUP, kind=weight)(x_TI), torch.from_numpy(expected))


def test_blocks_of_256() -> None:
    x_TI = drawn(3, 512)
    x_TI[1] = 0
    found_TI = LlamaInput(GROUP, kind="Q4_K")(x_TI)
    for token in range(3):
        for start in (0, 256):
            block = x_TI[token, start : start + 256].tolist()
            largest = max(block, key=abs)
            for place, value in enumerate(block):
                code = round(-127 * value / largest) if largest else 0
                expected = code * largest / -127
                assert float(found_TI[token, start + place]) == pytest.approx(expected, rel=1e-5)


def test_floats() -> None:
    x_TI = drawn(3, 8)
    assert torch.equal(LlamaInput(GROUP, kind="BF16")(x_TI), x_TI.bfloat16().float())
    assert LlamaInput(GROUP, kind="Q4_K")(drawn(0, 256)).shape == (0, 256)


def test_each_linear_by_the_type_of_its_weight(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "mixtral", **{**SIZES, "num_hidden_layers": 1})
    api.export(source, tmp_path / "m.gguf", to="gguf:Q4_K_M")
    file = open_model(tmp_path / "m.gguf")
    found = llama_inputs(file)
    assert found.keys() == file.linear_shapes().keys()  # the router is none of them
    down = found["model.layers.0.block_sparse_moe.experts.2.w2"]
    assert isinstance(down, LlamaInput)
    assert down.kind == "Q6_K"
    api.export(source, tmp_path / "plain.gguf", to="gguf:F16")
    assert llama_inputs(open_model(tmp_path / "plain.gguf")) == {}


def answered(view: Model, run: EngineRun, *, draw: int | None) -> Answer:
    """What an engine says that rounds inputs like llama.cpp, after our own likeliest tokens."""
    prompts_NT = torch.tensor(run.questions.prompts)
    plain_NTD = our_hidden(view, prompts_NT)
    view.quantizers = {} if draw is None else llama_inputs(view, draw)
    rows = [our_logits(view, x[:-1]) for x in our_hidden(view, run.questions.sequences_NT)]
    view.quantizers = {}
    chosen = our_logits(view, plain_NTD[:, -1]).argmax(-1)[:, None].tolist()
    return Answer("fake", "gguf", torch.stack(rows), tuple(map(tuple, chosen)), {})


def test_a_router_chooses_by_what_is_rounded(tmp_path: Path) -> None:
    """A mixture is bounded by what rounding does to our own run; other experts are beyond it."""
    saved(tmp_path / "model", "mixtral", **SIZES)
    swapped = build("mixtral", **SIZES)
    for block in swapped.model.layers:
        fused = block.mlp.experts
        fused.down_proj.data = fused.down_proj.data[[1, 0, 2, 3]]
    swapped.save_pretrained(tmp_path / "swapped")
    bpe_tokenizer().save_pretrained(tmp_path / "swapped")
    views = {}
    for name in ("model", "swapped"):
        api.export(tmp_path / name, tmp_path / f"{name}.gguf", to="gguf:Q8_0")
        views[name] = open_model(tmp_path / f"{name}.gguf")
    view = views["model"]
    run = EngineRun(Engine("llama.cpp", "llama.cpp", ()), tmp_path / "model.gguf", view)
    run.answer = answered(view, run, draw=9)
    own = run.moved()
    assert own is not None
    assert 0 < run.distance().kl < run.kl_limit() == max(KL_LIMITS["llama.cpp"], 2 * own.kl)
    assert "experts are chosen" in run.notes[0]
    assert view.quantizers == {}
    other = replace(run, answer=answered(views["swapped"], run, draw=None))
    other._distance = None
    assert other.distance().kl > 3 * other.kl_limit()


def test_a_dense_model_is_bounded_as_ever(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "llama")
    run = EngineRun(Engine("llama.cpp", "llama.cpp", ()), tmp_path, open_model(source))
    assert run.moved() is None
    assert run.kl_limit() == KL_LIMITS["llama.cpp"]
