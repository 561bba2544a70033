"""Whole runs in other number formats: resumed alike, accounted for, shared constants, fallbacks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.engine.test_engine import ledger_of
from tests.unit.engine.test_resume import Killed, digests

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import SCHEMES, QuantSpec, Recipe
from pocketlm.engine.events import Event
from pocketlm.engine.grids import choose_grids
from pocketlm.formats.compressed_config import holds

STEPS = ("clip", "gptq", "refine")


NAMES = ["FP8_BLOCK", pytest.param("NF4_DQ", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FP8_BLOCK", "NF4_DQ"])
def test_a_stopped_run_goes_on(tmp_path: Path, compress, name: str) -> None:
    weights = SCHEMES[name].fit(32).model_dump()

    def stop(event: Event) -> None:
        if event.kind == "block_done" and event.block == 1:
            raise Killed

    compress(tmp_path / "whole", steps=STEPS, weights=weights)
    with pytest.raises(Killed):
        compress(tmp_path / "parts", steps=STEPS, weights=weights, listener=stop)
    outcome = compress(tmp_path / "parts", steps=STEPS, weights=weights)
    assert outcome.blocks_resumed == 2
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_accounted_for(tmp_path: Path, compress, name: str) -> None:
    spec = SCHEMES[name].fit(32)
    compress(tmp_path / "whole", steps=STEPS, weights=spec.model_dump())
    ledger = ledger_of(tmp_path / "whole")
    assert ledger.format == ("compressed-tensors" if holds(spec) else "pocketlm")
    entries = [entry for entry in ledger.tensors.values() if entry.action == "quantized"]
    assert len(entries) == 3 * 7
    assert {entry.spec for entry in entries} == {spec}
    assert all(entry.bits == spec.stored_bits(entry.shape) for entry in entries)
    assert all(entry.error is not None and entry.error < 0.05 for entry in entries)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    bits = sum(8 * t.numel() * t.element_size() for t in stored.values())
    assert bits == sum(entry.bits for entry in ledger.tensors.values())


def test_fused_linears_share_the_constant_of_nvfp4(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out", steps=("rtn",), weights=SCHEMES["NVFP4"].model_dump())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for block in range(3):
        for parent, leaves in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        ):
            path = f"model.layers.{block}.{parent}"
            constants = {float(stored[f"{path}.{x}.weight_global_scale"]) for x in leaves}
            assert len(constants) == 1
            largest = max(stored[f"{path}.{x}.weight_scale"].float().max().item() for x in leaves)
            assert largest == 448


def recipe(weights: QuantSpec, **overrides: QuantSpec) -> Recipe:
    return Recipe.parse(
        {
            "steps": ["rtn"],
            "weights": weights.model_dump(),
            "overrides": {name: spec.model_dump() for name, spec in overrides.items()},
        }
    )


def test_what_a_format_cannot_cut_is_kept_and_said() -> None:
    shapes = {"a.q_proj": (64, 64), "a.odd_proj": (64, 40), "a.thin_proj": (64, 41)}
    grids = choose_grids(shapes, False, recipe(SCHEMES["NVFP4"]), "transformers")
    assert list(grids.specs) == ["a.q_proj"]
    said = "groups of 16, as NVFP4 has them, do not divide 40 columns"
    assert grids.kept["a.odd_proj"] == said
    tables = choose_grids(shapes, False, recipe(SCHEMES["NF4"]), "transformers")
    assert tables.format_name == "pocketlm"
    assert tables.specs["a.odd_proj"].group_size is None
    assert tables.kept["a.thin_proj"] == "41 codes of 4 bits do not fill whole bytes"


def test_one_table_among_integers_takes_our_own_format() -> None:
    shapes = {"a.q_proj": (64, 64), "a.o_proj": (64, 64)}
    mixed = recipe(QuantSpec(group_size=32), o_proj=SCHEMES["NF4"])
    assert choose_grids(shapes, False, mixed, "transformers").format_name == "pocketlm"
    with pytest.raises(UnsupportedLayer, match="vllm does not load the format pocketlm"):
        choose_grids(shapes, False, mixed, "vllm")


def test_a_mix_that_loads_in_bfloat16_alone_is_said() -> None:
    shapes = {"a.q_proj": (64, 64), "a.o_proj": (64, 64)}
    mixed = recipe(QuantSpec(group_size=32), o_proj=SCHEMES["MXFP4"])
    notes = choose_grids(shapes, False, mixed, "transformers").notes
    assert list(notes) == ["a.o_proj"]
    assert "bfloat16" in notes["a.o_proj"]
    assert not choose_grids(shapes, False, mixed, "vllm").notes
    assert not choose_grids(shapes, False, recipe(SCHEMES["MXFP4"]), "transformers").notes


def test_experts_take_what_the_target_runs_for_them() -> None:
    shapes = {f"l.experts.{i}.w1": (64, 64) for i in range(2)}
    assert choose_grids(shapes, False, recipe(SCHEMES["FP8_CHANNEL"]), "transformers").specs
    with pytest.raises(UnsupportedLayer, match="transformers does not run NVFP4 for experts"):
        choose_grids(shapes, False, recipe(SCHEMES["NVFP4"]), "transformers")


def test_the_plan_counts_the_same_bits(tmp_path: Path, compress) -> None:
    for name in ("FP8_TENSOR", "MXFP8"):
        compress(tmp_path / name, steps=("rtn",), weights=SCHEMES[name].model_dump())
        plan, ledger = compress._plan, ledger_of(tmp_path / name)
        assert plan.bits_per_weight == pytest.approx(ledger.bits_per_weight())
        stored = load_file(tmp_path / name / "model.safetensors")
        sizes = [math.prod(t.shape) * t.element_size() for t in stored.values()]
        assert plan.output_bytes == sum(sizes)
        assert any(t.dtype == torch.float8_e4m3fn for t in stored.values())
