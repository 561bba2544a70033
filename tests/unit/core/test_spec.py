"""Specs are validated, name the nearest key, and survive JSON."""

from __future__ import annotations

import pytest

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import (
    GGUF_TYPES,
    INPUTS,
    SCHEMES,
    QuantSpec,
    Recipe,
    matches,
    parse_inputs,
    parse_scheme,
)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'group_size'"):
        QuantSpec.parse({"groupsize": 64})


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="bits"):
        QuantSpec.parse({"bits": bits})


@pytest.mark.parametrize(
    ("asked", "columns", "fitted"),
    [
        (128, 4096, 128),
        (128, 576, 64),
        (128, 96, 32),
        (64, 1536, 64),
        (128, 50, None),
        (None, 50, None),
    ],
)
def test_group_size_that_does_not_divide(
    asked: int | None, columns: int, fitted: int | None
) -> None:
    assert QuantSpec(group_size=asked).fit(columns).group_size == fitted


def test_scheme_names() -> None:
    assert parse_scheme("w3a16") == QuantSpec(bits=3, group_size=128)
    with pytest.raises(ConfigError, match="W4A16"):
        parse_scheme("W4A61")


def test_real_bits() -> None:
    assert QuantSpec(bits=4, group_size=64).bits_per_weight(576) == 4.25
    assert QuantSpec(bits=3, symmetric=False, group_size=32).bits_per_weight(64) == 3 + 19 / 32


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W4A16", 4.125),
        ("MXFP4", 4.25),
        ("MXFP8", 8.25),
        ("NVFP4", 4.5),
        ("NF4", 4.25),
        ("NF4_DQ", 4 + 8 / 64 + 32 / (64 * 256)),
        ("FP8_CHANNEL", 8 + 16 / 256),
        ("FP8_TENSOR", 8.0),
        ("FP8_BLOCK", 8 + 16 / 128**2),
    ],
)
def test_real_bits_of_each_format(name: str, bits: float) -> None:
    spec = parse_scheme(name)
    assert spec.bits_per_weight(256) == bits
    # Of one weight in particular, with the constants of the tensor.
    constants = {"NVFP4": 32, "NF4_DQ": 32, "FP8_TENSOR": 16}.get(name, 0)
    assert spec.stored_bits((1024, 256)) == bits * 1024 * 256 + constants
    exact = spec.bits_per_weight(256, rows=1024)
    assert exact == spec.stored_bits((1024, 256)) / (1024 * 256)


def test_tiles_may_end_beyond_the_weight() -> None:
    block = parse_scheme("FP8_BLOCK")
    assert block.tiles((576, 1536)) == (5, 12)
    assert block.tiles((100, 576)) == (1, 5)
    assert parse_scheme("FP8_TENSOR").tiles((100, 576)) == (1, 1)
    assert block.stored_bits((100, 576)) == 100 * 576 * 8 + 5 * 16


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"type": "float"}, "'e8m0' in groups of 32 or 'e4m3' in groups of 16, not 'float'"),
        ({"type": "float", "bits": 6}, "'float' has 4 or 8 bits, not 6"),
        ({"type": "float", "bits": 8, "symmetric": False}, "only 'int' and 'k' may be asymmetric"),
        ({"type": "k", "bits": 4, "symmetric": True, "group_size": 32}, "4 bits is asymmetric"),
        ({"type": "k", "bits": 6, "scale": "k", "group_size": 32}, "groups of 16, not 32"),
        ({"type": "k", "bits": 3, "symmetric": False}, "3 bits is symmetric"),
        ({"type": "iq4_nl", "group_size": 64}, "groups of 32, not 64"),
        ({"type": "float", "scale": "e4m3", "group_size": 32}, "has groups of 16, not 32"),
        ({"type": "float", "scale": "e8m0", "group_size": None}, "has groups of 32, not None"),
        ({"type": "nf", "bits": 5}, "'nf' has 2 or 3 or 4 bits, not 5"),
        ({"type": "nf", "scale": "e8m0"}, "takes the scale 'float' or 'dynamic8'"),
        ({"type": "nf", "group_rows": 8}, "has a scale for each row"),
        ({"scale": "e8m0"}, "'int' of 4 bits takes the scale 'float'"),
        ({"group_rows": None, "group_size": None}, "has a scale for each row"),
        ({"type": "float", "bits": 8, "group_rows": None}, "both null"),
        ({"type": "float", "bits": 8, "group_rows": 8, "group_size": None}, "both given"),
        ({"type": "fp"}, "type"),
    ],
)
def test_what_does_not_go_together_is_refused(data: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantSpec.parse(data)
    with pytest.raises(ConfigError, match=said):
        Recipe.parse({"steps": ["rtn"], "weights": data})


@pytest.mark.parametrize("name", SCHEMES)
def test_formats_survive_json(name: str) -> None:
    spec = parse_scheme(name)
    assert QuantSpec.model_validate_json(spec.model_dump_json()) == spec
    assert QuantSpec.parse(spec.model_dump()) == spec
    assert INPUTS.get(name) == parse_inputs(name)
    if name not in INPUTS:
        plain = {"Q4_0": "INT4", "Q5_0": "INT5", "Q8_0": "INT8", "TQ2_0": "INT2"}
        said = plain.get(name, name.replace("W", "INT").removesuffix("A16"))
        assert spec.name in {name, said}


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Q2_K", 3.125), ("Q3_K", 3.5625), ("Q4_K", 4.625), ("Q6_K", 6.5625), ("Q5_1", 6.0)],
)
def test_bits_of_llama_cpps_formats(name: str, bits: float) -> None:
    """Scales of an artifact take a byte each, of a file four or six bits."""
    spec = GGUF_TYPES[name]
    assert spec.bits_per_weight(512) == bits == spec.bits_per_weight(512, rows=8)
    assert spec.by_rows


def test_k_quants_fall_back_as_in_llama_quantize() -> None:
    fitted = {name: GGUF_TYPES[name].fit(576) for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K")}
    expected = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert fitted == {name: GGUF_TYPES[other] for name, other in expected.items()}
    assert not GGUF_TYPES["Q4_K"].fit(40).fits(40)


def test_integers_are_written_as_before() -> None:
    written = {"bits": 4, "symmetric": True, "group_size": 64}
    assert QuantSpec(bits=4, group_size=64).model_dump(mode="json") == written
    assert Recipe.parse({"steps": ["rtn"]}).model_dump()["weights"]["group_size"] == 128


def test_formats_that_prescribe_their_groups_are_not_refitted() -> None:
    nvfp4, block = parse_scheme("nvfp4a16"), parse_scheme("FP8_BLOCK")
    assert nvfp4.fit(100) == nvfp4
    assert not nvfp4.fits(100)
    assert block.fit(100) == block
    assert block.fits(100)
    assert parse_scheme("NF4").fit(96).group_size == 32
    assert parse_scheme("MXFP4A16") == parse_scheme("MXFP4")


def test_recipe_round_trip_and_rules() -> None:
    recipe = Recipe.parse(
        {
            "steps": ["clip", {"method": "gptq", "damping": 0.02}],
            "weights": {"bits": 4, "group_size": 64},
            "overrides": {"*.down_proj": {"bits": 8, "group_size": 64}},
            "ignore": ["re:.*layers\\.0\\."],
        }
    )
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.steps[1].options == {"damping": 0.02}
    assert recipe.spec_for("model.layers.0.mlp.up_proj") is None
    assert recipe.spec_for("model.layers.1.mlp.down_proj") == QuantSpec(bits=8, group_size=64)
    assert recipe.spec_for("model.layers.1.mlp.up_proj") == QuantSpec(bits=4, group_size=64)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("Linear", "a.b", True),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("*.up_proj", "model.layers.0.mlp.up_proj", True),
        ("re:model.*gate$", "model.mlp.gate", True),
        ("re:gate", "model.mlp.gate", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected
