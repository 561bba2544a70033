"""What is told of the inputs that reached each linear, and inputs that cannot be calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.engine.conftest import Compress
from tests.unit.engine.test_engine import ledger_of
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pocketlm.core.errors import NumericError
from pocketlm.core.stats import Hessian
from pocketlm.engine.events import Event
from pocketlm.engine.health import InputWatch
from pocketlm.evaluate.verify import verify_artifact


def watch(*batches: torch.Tensor) -> InputWatch:
    seen = InputWatch(batches[0].shape[-1], torch.device("cpu"))
    for batch in batches:
        seen.add(batch)
    return seen


def test_dead_and_constant_columns_are_counted() -> None:
    x_TI = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    x_TI[:, :3] = 0
    x_TI[:, 3] = -2.5
    x_TI[:20, 4] = 1.0  # constant in the first batch only
    health = watch(x_TI[:20], x_TI[20:].view(2, 10, 16)).health(None)
    assert (health.tokens, health.columns) == (40, 16)
    assert (health.dead_columns, health.constant_columns) == (3, 1)
    assert health.effective_rank is None
    assert not health.few


def test_few_means_fewer_than_columns_and_some() -> None:
    assert watch(torch.ones(15, 16)).health(None).few
    assert not watch(torch.ones(16, 16)).health(None).few
    nothing = watch(torch.empty(0, 16)).health(Hessian(16))
    assert (nothing.tokens, nothing.few, nothing.effective_rank) == (0, False, 0)
    assert (nothing.dead_columns, nothing.constant_columns) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    x_TI = torch.randn(40, 16)
    x_TI[7, 2] = x_TI[33, 9] = value
    with pytest.raises(NumericError, match=r"up_proj: .* 2 of 16 columns"):
        watch(x_TI[:20], x_TI[20:]).require_finite("up_proj")


def test_the_ledger_tells_of_every_linear(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out")
    ledger = ledger_of(tmp_path / "out")
    quantized = [e for e in ledger.tensors.values() if e.action == "quantized"]
    assert all(e.inputs is not None and e.inputs.tokens == 6 * 32 for e in quantized)
    assert all(1 <= e.inputs.effective_rank <= e.inputs.columns for e in quantized)
    assert ledger.warnings == []
    kept = ledger.tensors["model.embed_tokens.weight"]
    assert kept.inputs is None


def test_without_data_there_is_nothing_to_tell(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out", steps=("rtn",))
    assert all(e.inputs is None for e in ledger_of(tmp_path / "out").tensors.values())


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "model"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=16, num_experts_per_tok=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # a router that leaves the last expert out: its rivals are always larger
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(30)
            layer.mlp.gate.weight[15] = 0
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_experts_with_few_tokens_are_named(tmp_path: Path, experts: Path) -> None:
    seen: list[Event] = []
    Compress(experts)(tmp_path / "out", listener=seen.append)
    ledger = ledger_of(tmp_path / "out")
    found = {
        name: entry for name, entry in ledger.tensors.items()
        if ".experts." in name and entry.inputs is not None
    }  # fmt: skip
    assert len(found) == 2 * 16 * 3
    total = sum(e.inputs.tokens for n, e in found.items() if n.endswith("gate_proj.weight"))
    assert total == 2 * 2 * 6 * 32  # blocks, experts a token, tokens
    few = {name for name, entry in found.items() if entry.inputs.few}
    assert few
    for name, entry in found.items():
        assert ("fewer calibration tokens" in " ".join(entry.notes)) == (name in few)
    none = {name for name, entry in found.items() if not entry.inputs.tokens}
    assert {name.split(".")[5] for name in none} >= {"15"}
    assert any("no calibration token reached" in warning for warning in ledger.warnings)
    assert any("fewer calibration tokens than they have inputs" in w for w in ledger.warnings)
    kinds = {event.data.get("kind") for event in seen if event.kind == "fallback"}
    assert {"few_tokens", "no_tokens"} <= kinds


@pytest.mark.parametrize("steps", [("clip", "rtn"), ("gptq",), ("smoothquant", "rtn")])
def test_an_overflow_on_the_text_is_an_error(tmp_path: Path, tiny: Path, steps) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = 3e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.gate_proj: .* not finite in 1 of 64"):
        Compress(broken)(tmp_path / "out", steps=steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
def test_gates_that_engines_take_for_linears_are_named(tmp_path: Path) -> None:
    """Routers and the gate of a shared expert are kept; transformers must not look for codes."""
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    Compress(tmp_path / "model")(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    mlp = "model.layers.0.mlp"
    assert section["ignore"] == [f"{mlp}.gate", f"{mlp}.shared_expert_gate", "lm_head"]
    checks = {check.name: check for check in verify_artifact(tmp_path / "out").checks}
    assert checks["transformers logits"].status == "passed", checks["transformers logits"].message
