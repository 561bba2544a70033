"""Whole runs that factorise: counted, resumed, composed, reloaded, exported, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests
from tests.unit.runtime.helpers import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import pocketlm.hf  # noqa: F401  (teaches transformers the format)
from pocketlm import api
from pocketlm.core.errors import ConfigError, OutputBusy, UnsupportedLayer
from pocketlm.core.stored import DenseSpec, LowRankSpec, SumSpec
from pocketlm.engine.events import Event
from pocketlm.evaluate.verify_files import Artifact, checks
from pocketlm.runtime.factored import LowRankLinear, SumLinear
from pocketlm.runtime.load import load

W8 = {"bits": 8, "group_size": None}
W3 = {"bits": 3, "group_size": 32}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            initializer_range=0.2,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96,
            initializer_range=0.2, bos_token_id=256, eos_token_id=256,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        path = found[name] = tmp_path_factory.mktemp(name) / "model"
        build().to(torch.bfloat16).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return found


def recipe(*steps: Any, weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"steps": list(steps), "weights": weights, "ignore": ["lm_head"], **more}


def run(source: Path, output: Path, asked: dict[str, Any], **options: Any) -> api.CompressResult:
    settings = {"samples": 8, "seq_len": 64, "device": "cpu", **options}
    return api.compress(source, asked, output, **settings)


SVD = {"method": "svd", "ratio": 0.2}
SVD_LLM = {"method": "svd_llm", "ratio": 0.2}
LQER = {"method": "lqer", "rank": 4, "group_size": 32}
RECIPES = {
    "svd": recipe(SVD),
    "asvd": recipe({"method": "asvd", "ratio": 0.3}),
    "fwsvd": recipe({"method": "fwsvd", "rank": 8}),
    "svd_llm": recipe("correct", SVD_LLM),
    "laser": recipe({"method": "laser", "layers": "1", "keep": 0.25}),
    "losparse": recipe({"method": "losparse", "ratio": 0.4, "density": 0.1, "rounds": 2}),
    "svd_llm-w8": recipe(SVD_LLM, "rtn", weights=W8),
    "fwsvd-gptq": recipe({"method": "fwsvd", "rank": 32}, "clip", "gptq", weights=W3),
    "lqer": recipe("clip", "gptq", LQER, weights=W3),
    "lorc-16": recipe("rtn", {"method": "lorc", "rank": 4, "bits": None}, weights=W3),
    "caldera": recipe(
        "gptq", {"method": "caldera", "rank": 4, "iterations": 2}, "gptq",
        {"method": "caldera", "rank": 4, "iterations": 2}, weights=W3,
    ),
}  # fmt: skip


ALONE = ("svd", "asvd", "fwsvd", "laser", "losparse", "lorc-16")  # so in tests/contracts


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALONE else []) for n in RECIPES]
)
def test_every_bit_is_planned_and_accounted_for(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    made = run(sources["llama"], tmp_path / "out", RECIPES[name])
    ledger = ledger_of(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    bytes_stored = sum(t.numel() * t.element_size() for t in stored.values())
    assert made.plan.output_bytes == bytes_stored
    assert made.plan.bits_per_weight == pytest.approx(made.bits_per_weight)
    entries = ledger.compressed()
    assert len(entries) == 2 * 7
    factorised = [entry for entry in entries.values() if entry.action == "factorised"]
    assert len(factorised) == (3 if name == "laser" else 14)
    assert all(entry.rank is not None and entry.rank > 0 for entry in factorised)
    assert all(isinstance(entry.spec, LowRankSpec | SumSpec) for entry in factorised)
    artifact = Artifact.open(tmp_path / "out")
    for _, _, check in checks(sources["llama"]):
        check(artifact)  # an artifact that is not what its ledger says raises


def test_a_fifth_of_the_parameters_is_gone(sources: dict[str, Path], tmp_path: Path) -> None:
    made = run(sources["llama"], tmp_path / "out", RECIPES["svd"])
    entries = ledger_of(tmp_path / "out").compressed()
    assert made.bits_per_weight <= 0.8 * 16
    for entry in entries.values():
        rows, columns = entry.shape
        assert entry.bits == entry.rank * (rows + columns) * 16
        assert entry.bits <= 0.8 * 16 * rows * columns


@pytest.mark.parametrize("name", ["fwsvd-gptq", pytest.param("losparse", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "block_done" and event.block == 0:
            raise Killed

    run(sources["llama"], tmp_path / "whole", RECIPES[name])
    with pytest.raises(Killed):
        run(sources["llama"], tmp_path / "parts", RECIPES[name], on_event=stop)
    run(sources["llama"], tmp_path / "parts", RECIPES[name])
    ours, theirs = digests(tmp_path / "whole"), digests(tmp_path / "parts")
    reports = {"README.md", "pocketlm/report.html", "pocketlm/metrics.json"}  # they tell times
    assert {k: v for k, v in ours.items() if k not in reports} == {
        k: v for k, v in theirs.items() if k not in reports
    }


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "svd_llm-w8"), ("llama", "losparse"), ("llama", "caldera"), ("gpt2", "svd_llm"),
        ("gpt2", "lqer"), ("mixtral", "svd_llm-w8"),
    ],
)  # fmt: skip
def test_it_runs_in_factors_and_as_its_dense_self(
    family: str, name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """`pocketlm.load` keeps the factors; the export, and transformers' own classes, agree."""
    run(sources[family], tmp_path / "out", RECIPES[name])
    api.export(tmp_path / "out", tmp_path / "dense", dtype="float32")
    ids = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, _ = load(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    kind = SumLinear if name in ("lqer", "losparse", "caldera") else LowRankLinear
    assert any(isinstance(module, kind) for module in ours.modules())
    with torch.inference_mode():
        found, truth = ours(ids).logits, dense(ids).logits
        assert torch.allclose(found, truth, atol=2e-3 * float(truth.abs().max()))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(theirs.eval()(ids).logits, truth)


def test_factors_in_memory_are_no_larger_than_stored(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources["llama"], tmp_path / "out", RECIPES["svd"])
    model, _ = load(tmp_path / "out", dtype=torch.bfloat16)
    whole, _ = load(sources["llama"], dtype=torch.bfloat16)

    def held(one: Any) -> int:
        return sum(
            p.numel() * p.element_size() for n, p in one.named_parameters() if "layers." in n
        )

    linears = sum(e.bits // 8 for e in ledger_of(tmp_path / "out").compressed().values())
    norms = held(whole) - sum(
        m.weight.nbytes for n, m in whole.named_modules() if "layers." in n and n.endswith("_proj")
    )
    assert held(model) == linears + norms


def test_quantized_factors_lose_little_more(sources: dict[str, Path], tmp_path: Path) -> None:
    plain = run(sources["llama"], tmp_path / "plain", recipe(SVD_LLM))
    eight = run(sources["llama"], tmp_path / "eight", RECIPES["svd_llm-w8"])
    assert eight.bits_per_weight < 0.53 * plain.bits_per_weight
    assert eight.mean_error == pytest.approx(plain.mean_error, rel=0.02)


def test_repair_lowers_the_error(sources: dict[str, Path], tmp_path: Path) -> None:
    errors = {}
    for name, steps in {
        "gptq": ["clip", "gptq"], "lqer": ["clip", "gptq", LQER],
        "caldera": RECIPES["caldera"]["steps"],
    }.items():  # fmt: skip
        errors[name] = run(sources["llama"], tmp_path / name, recipe(*steps, weights=W3)).mean_error
    assert errors["lqer"] < 0.95 * errors["gptq"]
    assert errors["caldera"] < 0.95 * errors["gptq"]


def test_ratio_zero_is_the_original(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["llama"], tmp_path / "out", recipe({"method": "svd", "ratio": 0.0}))
    entries = ledger_of(tmp_path / "out").compressed()
    assert {entry.action for entry in entries.values()} == {"kept"}
    assert all(isinstance(entry.spec, DenseSpec) for entry in entries.values())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(sources["llama"] / "model.safetensors")
    assert stored.keys() == source.keys()
    assert all(torch.equal(stored[name], value) for name, value in source.items())


@pytest.mark.parametrize("allocation", ["energy", "sensitivity"])
def test_ranks_by_budget_become_a_recipe(
    allocation: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    steps = {"method": "svd_llm", "ratio": 0.4, "allocation": allocation, "multiple_of": 1}
    made = run(sources["llama"], tmp_path / "out", recipe(steps), search_dir=tmp_path / "findings")
    entries = ledger_of(tmp_path / "out").compressed()
    weights = sum(math.prod(entry.shape) for entry in entries.values())
    assert sum(entry.bits for entry in entries.values()) <= 0.6 * 16 * weights
    assert made.bits_per_weight > 0.59 * 16
    assert len({entry.rank for entry in entries.values()}) > 3
    uniform = run(
        sources["llama"], tmp_path / "uniform", recipe({**steps, "allocation": "uniform"})
    )
    if allocation == "energy":
        assert made.mean_error < uniform.mean_error


def test_export_counts_what_it_costs(sources: dict[str, Path], tmp_path: Path) -> None:
    made = run(sources["llama"], tmp_path / "out", RECIPES["svd"])
    found = api.export(tmp_path / "out", tmp_path / "dense")
    source = load_file(sources["llama"] / "model.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert dense.keys() == source.keys()
    assert {t.dtype for t in dense.values()} == {torch.bfloat16}
    assert found.bytes_before == made.output_bytes
    assert found.bytes_after == sum(t.nbytes for t in source.values()) > found.bytes_before
    assert found.products_before <= 0.8 * found.products_after
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    with pytest.raises(OutputBusy, match="not empty"):
        api.export(tmp_path / "out", tmp_path / "dense")
    with pytest.raises(ConfigError, match="no export to 'onx'"):
        api.export(tmp_path / "out", tmp_path / "other", to="onx")
    with pytest.raises(ConfigError, match="dense already"):
        api.export(sources["llama"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (recipe(SVD, SVD_LLM), "factorise again"),
        (recipe(SVD_LLM, "correct", "gptq", weights=W3), "does not know the factors"),
        (recipe(SVD_LLM, "autoround", weights=W3), "does not know the factors"),
        (recipe(LQER), "no step before it"),
        (recipe(SVD_LLM, weights=W3), "quantizes nothing"),
        (recipe({"method": "losparse", "density": 0.9}), "no room"),
        (recipe({"method": "losparse"}, "rtn", weights=W3), "nothing quantizes it"),
        (recipe({"method": "svd", "ranks": {"qq_proj": 3}}), "matches no linear"),
        (recipe({"method": "laser", "layers": "7-9"}), "factorises no linear"),
        (recipe("laser"), "which layers"),
        (recipe({"method": "svd", "ratio": 0.99}), "do not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    asked: dict[str, Any], said: str, sources: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=said):
        api.plan(sources["llama"], asked, samples=2, seq_len=32)


def test_an_engine_that_knows_no_factors_is_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedLayer, match="only one with factors"):
        api.plan(sources["llama"], recipe(SVD), samples=2, seq_len=32, target="vllm")
    narrow = recipe(
        SVD_LLM, "rtn", weights={"type": "float", "bits": 4, "group_size": 32, "scale": "e8m0"}
    )
    with pytest.raises(UnsupportedLayer, match="does not fit a factor"):
        api.plan(sources["llama"], narrow, samples=2, seq_len=32)
