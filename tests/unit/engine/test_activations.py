"""Whole runs with rounded inputs: resumed alike, accounted for, propagated, run as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.conftest import save_tokenizer
from tests.unit.engine.conftest import Compress
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests
from tests.unit.models.families import build

from pocketlm.core.errors import CalibrationError, UnsupportedLayer
from pocketlm.core.spec import INPUTS, SCHEMES, ActivationSpec
from pocketlm.engine.events import Event
from pocketlm.evaluate.verify import verify_artifact
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.hf import plain_logits
from pocketlm.models import open_model, runtime_model
from pocketlm.runtime.load import load, packed_summary

TOKENS = list(range(3, 35))


pytestmark = pytest.mark.usefixtures("in_process")


KINDS = {
    **{name: (SCHEMES[name].fit(32), INPUTS[name]) for name in INPUTS if name != "FP8_BLOCK"},
    "W8A8_ASYMMETRIC": (SCHEMES["W8A8"], ActivationSpec(symmetric=False)),
    "W8A8_STATIC_ASYMMETRIC": (
        SCHEMES["W8A8"],
        ActivationSpec(symmetric=False, granularity="tensor", dynamic=False),
    ),
    "ZEROQUANT": (SCHEMES["W8A8"].model_copy(update={"group_size": 32}), ActivationSpec()),
    "LLM_INT8": (SCHEMES["LLM_INT8"], ActivationSpec(outliers=1.0)),  # a tiny model's are small
    "FP8_BLOCK": (
        SCHEMES["FP8_BLOCK"].model_copy(update={"group_size": 32, "group_rows": 32}),
        ActivationSpec(type="float", granularity="group", group_size=32),
    ),
}


def arguments(kind: str) -> dict[str, dict[str, object]]:
    weights, inputs = KINDS[kind]
    return {"weights": weights.model_dump(), "activations": inputs.model_dump()}


def steps_of(kind: str) -> tuple[str, ...]:
    if kind == "LLM_INT8":
        return ("llm_int8",)
    return ("rtn",) if kind.startswith("FP8") else ("smoothquant", "gptq")


FAST = ("W8A8_STATIC_ASYMMETRIC", "LLM_INT8", "FP8_DYNAMIC")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_what_is_written_runs_alike_everywhere(
    tmp_path: Path, compress, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_model, "load_tokenizer", lambda *args, **kwargs: None)
    weights, inputs = KINDS[kind]
    compress(tmp_path / "out", steps=steps_of(kind), **arguments(kind))
    ledger = ledger_of(tmp_path / "out")
    entries = [entry for entry in ledger.tensors.values() if entry.action == "quantized"]
    assert len(entries) == 3 * 7
    assert {entry.spec for entry in entries} == {weights}
    assert {entry.activations for entry in entries} == {inputs}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    bits = sum(8 * t.numel() * t.element_size() for n, t in stored.items() if "shape" not in n)
    assert bits == sum(entry.bits for entry in ledger.tensors.values())
    assert sum("input_scale" in name for name in stored) == (0 if inputs.dynamic else 3 * 7)

    view = open_model(tmp_path / "out", allow_compressed=True)
    ours_TV = view_logits(view, TOKENS)
    assert torch.equal(ours_TV, plain_logits(tmp_path / "out", TOKENS)), "transformers computes it"
    view.quantizers = {}
    unrounded_TV = view_logits(view, TOKENS)
    assert not torch.equal(unrounded_TV, ours_TV)
    # The runtime sums in another order. An input that ends on the edge between two codes, as a
    # token's largest does, may then take the other one; test_codes.py compares layer by layer.
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    whole = inputs.type == "int" and weights.bits == 8 and weights.group_size is None
    assert ("int8-codes" in packed_summary(model).kernels) == whole
    with torch.no_grad():
        packed_TV = model(torch.tensor([TOKENS])).logits[0]
    assert (packed_TV - ours_TV).norm() < (unrounded_TV - ours_TV).norm()


@pytest.mark.parametrize("kind", ["W8A8_STATIC_ASYMMETRIC"])  # it stores a scale and a zero point
def test_a_stopped_run_gives_the_same_bytes(tmp_path: Path, compress, kind: str) -> None:
    def stop(event: Event) -> None:
        if event.kind == "block_done" and event.block == 1:
            raise Killed

    steps = ("smoothquant", "correct", "gptq")
    compress(tmp_path / "whole", steps=steps, **arguments(kind))
    with pytest.raises(Killed):
        compress(tmp_path / "parts", steps=steps, listener=stop, **arguments(kind))
    outcome = compress(tmp_path / "parts", steps=steps, activation_bytes=1, **arguments(kind))
    assert outcome.blocks_resumed == 2
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_verify_and_card_know_of_the_inputs(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out", steps=("smoothquant", "gptq"), **arguments("W8A8_STATIC"))
    report = verify_artifact(tmp_path / "out")
    assert not report.failures()
    assert any("bit-equal to transformers" in check.message for check in report.checks)
    text = (tmp_path / "out" / "config.json").read_text()
    broken = text.replace('"symmetric": true', '"symmetric": false')
    (tmp_path / "out" / "config.json").write_text(broken)
    assert not verify_artifact(tmp_path / "out").ok


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "model"
    build("mixtral", vocab_size=300, num_local_experts=6).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["FP8_DYNAMIC", *(pytest.param(k, marks=pytest.mark.slow) for k in ("W8A8_STATIC", "W4A8"))],
)
def test_a_mixture_of_experts(
    tmp_path: Path, mixture: Path, compress_from: type[Compress], kind: str
) -> None:
    changed = arguments(kind)
    if kind == "W4A8":
        changed["weights"]["group_size"] = 16  # divides the columns of all of an expert's linears
    compress_from(mixture)(tmp_path / "out", steps=steps_of(kind), **changed)
    ledger = ledger_of(tmp_path / "out")
    expert = ledger.tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert expert.activations is None
    assert any("does not round inputs of experts" in note for note in expert.notes)
    attention = ledger.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert attention.activations == KINDS[kind][1]
    report = verify_artifact(tmp_path / "out")
    assert not report.failures()
    assert any("experts' gate and up as one" in check.message for check in report.checks)


def test_experts_in_our_own_format_are_refused_for_transformers(
    tmp_path: Path, mixture: Path, compress_from: type[Compress]
) -> None:
    with pytest.raises(UnsupportedLayer, match=r"experts.*Ignore the experts"):
        compress_from(mixture)(tmp_path / "out", steps=("llm_int8",), **arguments("LLM_INT8"))


def test_experts_in_our_own_format_run_in_our_own_runtime(
    tmp_path: Path, mixture: Path, compress_from: type[Compress]
) -> None:
    out = tmp_path / "out"
    compress_from(mixture)(out, steps=("llm_int8",), target="pocketlm", **arguments("LLM_INT8"))
    tensors = ledger_of(out).tensors
    expert = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert expert.action == "quantized"
    assert any("does not round inputs of experts" in note for note in expert.notes)
    attention = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert attention.activations == KINDS["LLM_INT8"][1]
    assert not verify_artifact(out).failures()
    tokens = torch.arange(20)[None]
    logits = []
    for path in (mixture, out):
        save_tokenizer(path)  # which `load` wants
        logits.append(load(path, dtype=torch.float32)[0](tokens).logits)
    assert (logits[1] - logits[0]).norm() < 0.1 * logits[0].norm()


def test_a_mixture_of_experts_with_weights_alone(
    tmp_path: Path, mixture: Path, compress_from: type[Compress]
) -> None:
    compress_from(mixture)(tmp_path / "out", weights={"bits": 4, "group_size": 16})
    report = verify_artifact(tmp_path / "out")
    assert not report.failures()
    assert any("experts' gate and up as one" in check.message for check in report.checks)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FP8_DYNAMIC", "the inputs of experts unrounded"),
        pytest.param("W8A8", "no integer experts", marks=pytest.mark.slow),
    ],
)
def test_experts_for_an_engine_that_rounds_their_inputs(
    tmp_path: Path, mixture: Path, compress_from: type[Compress], kind: str, said: str
) -> None:
    compress_from(mixture)(tmp_path / "out", steps=steps_of(kind), target="vllm", **arguments(kind))
    ledger = ledger_of(tmp_path / "out")
    expert = ledger.tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert expert.activations == KINDS[kind][1]
    report = verify_artifact(tmp_path / "out")
    assert not report.failures()
    assert any(said in check.message for check in report.checks)


def test_static_ranges_of_experts_without_tokens_are_their_siblings(
    tmp_path: Path, mixture: Path, compress_from: type[Compress]
) -> None:
    from pocketlm.engine import inputs as engine_inputs

    original = engine_inputs._ranges

    def none_for_expert_3(*args):
        ranges = original(*args)
        groups = {g.index: g.linears[0] for g in args[1]}
        for index, name in groups.items():
            if ".experts.3." in name:
                ranges[index] = type(ranges[index])(ranges[index].columns)
        return ranges

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_inputs, "_ranges", none_for_expert_3)
        compress_from(mixture)(tmp_path / "out", steps=("rtn",), target="vllm", **arguments("FP8"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.0.block_sparse_moe.experts.{}.w1.input_scale"
    scales = [float(stored[path.format(expert)]) for expert in range(6)]
    assert scales[3] == max(scales)
    notes = ledger_of(tmp_path / "out").tensors[path.format(3).replace("input_scale", "weight")]
    assert any("as its siblings'" in note for note in notes.notes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_inputs,
            "_ranges",
            lambda *args: {i: type(r)(r.columns) for i, r in original(*args).items()},
        )
        with pytest.raises(CalibrationError, match="no range"):
            compress_from(mixture)(
                tmp_path / "none", steps=("rtn",), target="vllm", **arguments("FP8")
            )


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("ZEROQUANT", "vllm", "no kernel for INT8_GROUP"),
        ("W4A8", "vllm", "no kernel for INT4_GROUP"),
        ("FP8", "vllm-cpu", "does not round inputs as float8-tensor"),
        ("FP8_BLOCK", "vllm", "does not divide"),
        ("LLM_INT8", "vllm", "does not load the format pocketlm"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(
    tmp_path: Path, compress, kind: str, target: str, message: str
) -> None:
    changed = arguments(kind)
    if kind == "FP8_BLOCK":
        changed["activations"]["group_size"] = 128
        message = "inputs in groups of 128 do not divide 64 columns"
    with pytest.raises(UnsupportedLayer, match=message):
        compress(tmp_path / "out", target=target, **changed)
