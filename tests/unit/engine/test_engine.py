"""What the engine promises of a whole run: propagation, accounts, events, prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.unit.engine import conftest
from tests.unit.models.families import build

from pocketlm import api
from pocketlm.core.errors import CalibrationError, ConfigError, UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Recipe
from pocketlm.core.stats import Hessian
from pocketlm.engine.events import Event
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.ledger import Ledger
from pocketlm.models import open_model
from pocketlm.models.stream import SafetensorsSource
from pocketlm.quant.gptq import Gptq


def ledger_of(output: Path) -> Ledger:
    return Ledger.model_validate_json((output / "pocketlm" / "ledger.json").read_text())


def test_every_tensor_is_accounted_for(tmp_path: Path, compress, tiny: Path) -> None:
    compress(tmp_path / "out")
    ledger = ledger_of(tmp_path / "out")
    source, written = SafetensorsSource(tiny).infos(), SafetensorsSource(tmp_path / "out").infos()
    assert set(ledger.tensors) == set(source)
    assert {name for entry in ledger.tensors.values() for name in entry.outputs} == set(written)
    assert ledger.bits_per_weight() == 4 + 16 / 32
    quantized = [entry for entry in ledger.tensors.values() if entry.action == "quantized"]
    assert len(quantized) == 3 * 7
    assert all(entry.error is not None and 0 < entry.error < 0.1 for entry in quantized)
    stored_bits = sum(info.bytes_stored * 8 for info in written.values())
    shapes_bits = sum(i.bytes_stored * 8 for n, i in written.items() if n.endswith("weight_shape"))
    assert sum(entry.bits for entry in ledger.tensors.values()) == stored_bits - shapes_bits


def test_next_block_sees_what_was_written(
    tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessian of the last block's first group equals that of the written model's own run."""
    gathered: list[Hessian] = []
    original = Gptq.compress

    def spy(self, state, stats):
        if state.name == "model.layers.2.self_attn.q_proj":
            gathered.append(stats[Hessian])
        return original(self, state, stats)

    monkeypatch.setattr(Gptq, "compress", spy)
    compress(tmp_path / "out", steps=("gptq",))
    model = open_model(tmp_path / "out", allow_compressed=True)
    tokens_NT = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    expected = Hessian(64)
    hidden, call = model.begin(tokens_NT)
    for index in range(2):
        with model.block(index) as block:
            hidden = block.forward(hidden, call)
    with model.block(2) as block:
        pause = block.start(hidden, call).advance()
        assert pause is not None
        expected.add(pause.inputs)
    assert torch.allclose(gathered[0].matrix_II(), expected.matrix_II(), rtol=1e-4, atol=1e-6)


def test_events_tell_the_way(tmp_path: Path, compress) -> None:
    seen: list[Event] = []
    compress(tmp_path / "out", listener=seen.append)
    kinds = [event.kind for event in seen]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_done"
    done = [event for event in seen if event.kind == "block_done"]
    assert [event.done for event in done] == [1, 2, 3]
    assert all(event.seconds_left is not None for event in done)
    log = (tmp_path / "out" / "pocketlm" / "events.jsonl").read_text().splitlines()
    kept = [kind for kind in kinds if kind != "progress"]
    assert [json.loads(line)["kind"] for line in log] == kept[: len(log)]
    shares = [event.share for event in seen if event.share is not None]
    assert shares == sorted(shares)
    stages = [event.data["stage"] for event in seen if event.kind == "stage"]
    assert stages == ["calibrate", "compress", "assemble"]


def test_data_free_recipe_needs_no_tokens(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out", steps=("rtn",))
    entry = ledger_of(tmp_path / "out").tensors["model.layers.0.mlp.up_proj.weight"]
    assert entry.reason == "rtn"
    assert entry.error is not None


def recipe(**changes: object) -> Recipe:
    return Recipe.parse({"steps": ["rtn"], **changes})


SHAPES = {"model.layers.0.mlp.up_proj": (64, 576), "model.layers.0.mlp.down_proj": (576, 1536)}


def test_calibration_without_tokens_is_refused(
    tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "Windows", lambda *args: None)
    with pytest.raises(CalibrationError, match="needs calibration tokens"):
        compress(tmp_path / "out", steps=("gptq",))
    assert not list(tmp_path.iterdir())


def test_group_size_is_fitted_and_said() -> None:
    grids = choose_grids(SHAPES, False, recipe(), "transformers")
    assert [spec.group_size for spec in grids.specs.values()] == [64, 128]
    assert "576" in grids.notes["model.layers.0.mlp.up_proj"]


def test_a_group_size_that_no_linear_can_have_is_refused() -> None:
    grids = choose_grids(SHAPES, False, recipe(weights={"group_size": 96}), "transformers")
    assert [spec.group_size for spec in grids.specs.values()] == [96, 96]
    some = choose_grids(SHAPES, False, recipe(weights={"group_size": 256}), "transformers")
    assert [spec.group_size for spec in some.specs.values()] == [64, 256]
    with pytest.raises(ConfigError, match=r"no linear \(576, 1536\)\. Give 128, 64, 32, or -1"):
        choose_grids(SHAPES, False, recipe(weights={"group_size": 100}), "transformers")
    ignored = recipe(weights={"group_size": 256}, ignore=("*down_proj",))
    with pytest.raises(ConfigError, match=r"no linear \(576\)\. Give 64, 32, or -1"):
        choose_grids(SHAPES, False, ignored, "transformers")


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'up_proj'"):
        choose_grids(SHAPES, False, recipe(ignore=("upproj",)), "transformers")


def test_nothing_left() -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        choose_grids(SHAPES, False, recipe(ignore=("Linear",)), "transformers")


FP8 = QuantSpec(bits=8, type="float", group_size=None)


def test_target_that_cannot_load() -> None:
    with pytest.raises(UnsupportedLayer, match=r"llama\.cpp"):
        choose_grids(SHAPES, False, recipe(weights=FP8), "llama.cpp")


@pytest.mark.usefixtures("in_process")
def test_experts_of_a_layer_are_named_as_one_format(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    build("mixtral", torch.bfloat16, **sizes).save_pretrained(tmp_path / "moe")
    recipe = {"steps": ["rtn"], "weights": {"bits": 4, "group_size": 128}}
    api.compress(tmp_path / "moe", recipe, tmp_path / "out", device="cpu")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = section["config_groups"].values()
    assert group["weights"]["strategy"] == "group"  # the whole row of one, half of another
    assert group["weights"]["group_size"] == 64
    report = api.verify(tmp_path / "out")
    assert [check.name for check in report.checks if check.status == "failed"] == []
