"""Learned steps in a run: they lower the block's error, compose, resume, and know idle experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from pocketlm.core import reconstruct as loop
from pocketlm.core.errors import ConfigError
from pocketlm.core.reconstruct import Outcome
from pocketlm.engine.events import Event
from pocketlm.quant import fake_quant
from pocketlm.quant.autoround import Autoround
from pocketlm.quant.learned_clip import LearnedClip
from pocketlm.quant.lkd import Lkd

AUTOROUND: dict[str, Any] = {"method": "autoround", "iters": 8, "batch_size": 4}
CLIP: dict[str, Any] = {"method": "learned_clip", "epochs": 4, "batch_size": 4, "rate": 0.5}
LKD: dict[str, Any] = {"method": "lkd", "iters": 8, "batch_size": 4, "rate": 0.1}


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What learning came to, block by block."""
    found: list[Outcome] = []

    def spy(*arguments: Any) -> Outcome:
        found.append(loop.reconstruct(*arguments))
        return found[-1]

    monkeypatch.setattr(fake_quant, "reconstruct", spy)
    return found


def name_of(recipe: tuple[Any, ...]) -> str:
    return "-".join(step if isinstance(step, str) else step["method"] for step in recipe)


AWQ = {"method": "awq", "steps": 2}
RECIPES = [
    (AWQ, "clip", AUTOROUND),
    ("clip", LKD),
    (AUTOROUND, "refine"),
    (CLIP, "gptq"),
]


@pytest.mark.slow  # tests/contracts stops each method once; GPT-2 below shows that errors fall
@pytest.mark.parametrize("steps", RECIPES, ids=name_of)
def test_block_error_falls_and_a_stopped_run_gives_the_same_bytes(
    tmp_path: Path, compress, outcomes: list[Outcome], steps: tuple[Any, ...]
) -> None:
    compress(tmp_path / "whole", steps=steps, bits=3)
    blocks = len([step for step in steps if step in (AUTOROUND, CLIP, LKD)]) * 3
    assert len(outcomes) == blocks
    assert all(outcome.after < 0.97 * outcome.before for outcome in outcomes)

    def listen(event: Event) -> None:
        if event.kind == "block_started" and event.block == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "parts", steps=steps, bits=3, listener=listen)
    compress(tmp_path / "parts", steps=steps, bits=3)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_where_activations_lie_does_not_change_the_result(tmp_path: Path, compress) -> None:
    steps = ("clip", AUTOROUND)
    compress(tmp_path / "memory", steps=steps)
    compress(tmp_path / "disk", steps=steps, activation_bytes=1000)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk")


def test_it_says_how_far_it_has_come(tmp_path: Path, compress) -> None:
    events: list[Event] = []
    compress(tmp_path / "out", steps=(AUTOROUND,), listener=events.append)
    for block in range(3):
        told = [e.data for e in events if e.kind == "loss" and e.block == block]
        assert len(told) > 4
        assert told[-1]["share"] == 1.0
        assert told[-1]["loss"] < told[0]["loss"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose router never chooses expert 3."""
    path = tmp_path_factory.mktemp("experts") / "model"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=5, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        gate_ED = layer.mlp.gate.weight.data
        # Of a, -a, b, 0, -b the two largest products with any token are those above zero.
        gate_ED[1], gate_ED[3], gate_ED[4] = -gate_ED[0], 0.0, -gate_ED[2]
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "step",
    [AUTOROUND, pytest.param(LKD, marks=pytest.mark.slow)],
    ids=lambda step: step["method"],
)
def test_idle_experts_keep_their_start(
    tmp_path: Path, compress_from, outcomes: list[Outcome], experts: Path, step: dict[str, Any]
) -> None:
    compress_from(experts)(tmp_path / "out", steps=("rtn", step), bits=3)
    assert all(outcome.after < 0.97 * outcome.before for outcome in outcomes)
    idle = set().union(*(outcome.idle for outcome in outcomes))
    assert idle
    assert all("experts.3" in name for name in idle)
    compress_from(experts)(tmp_path / "rtn", steps=("rtn",), bits=3)
    ledger = ledger_of(tmp_path / "out")
    for name in idle:
        entry = ledger.tensors[f"{name}.weight"]
        assert any("no calibration token" in note for note in entry.notes)


@pytest.mark.parametrize("step", [AUTOROUND, CLIP, LKD], ids=lambda step: step["method"])
def test_gpt2_stores_its_weights_transposed(
    tmp_path: Path, compress_from, outcomes: list[Outcome], step: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    compress_from(tmp_path / "model")(tmp_path / "out", steps=(step,), bits=3)
    assert all(outcome.after < 0.97 * outcome.before for outcome in outcomes)
    assert all(not outcome.idle for outcome in outcomes)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Autoround, {"preset": "quick"}),
        (Autoround, {"iters": 0}),
        (Autoround, {"batch_size": 0}),
        (Autoround, {"rate": 0}),
        (Autoround, {"iterations": 5}),
        (LearnedClip, {"epochs": 0}),
        (LearnedClip, {"rate": 0.0}),
        (LearnedClip, {"learning_rate": 0.1}),
        (Lkd, {"iters": -1}),
        (Lkd, {"rate": 2.0}),
    ],
)
def test_wrong_options_are_refused(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        method.parse(options)


def test_presets_name_iterations() -> None:
    named = {preset: Autoround.parse({"preset": preset}).iterations for preset in
             ("light", "default", "best")}  # fmt: skip
    assert named == {"light": 50, "default": 200, "best": 1000}
    assert Autoround.parse({"preset": "best", "iters": 7}).iterations == 7
