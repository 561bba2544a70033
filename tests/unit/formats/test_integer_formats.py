"""GPTQ and AWQ: the bytes that other tools write, and back; what they cannot hold is refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.permuted import Permuted, sort_by_group
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats import format_for
from pocketlm.formats.read import CompressedIndex

ROWS, COLUMNS, GROUP = 32, 64, 32

# sha256 of qweight and qzeros as the packers of auto-round 0.16.1 write them for `golden(bits)`
GOLDEN = {
    ("gptq", 2): ("839aa8853c491022", "5a7c9f54d9913404"),
    ("gptq_v2", 2): ("839aa8853c491022", "70359f845e04137b"),
    ("gptq", 3): ("5e6833146eec894f", "c29834cc7f88ef26"),
    ("gptq_v2", 3): ("5e6833146eec894f", "2ef8a0f61e0bd100"),
    ("gptq", 4): ("76d17a4c978f2865", "ebb3554a39eded39"),
    ("gptq_v2", 4): ("76d17a4c978f2865", "4c580659f8d09b5d"),
    ("awq", 4): ("932a90b33cdbb76d", "f77a0eae9a974a50"),
    ("gptq", 8): ("0d00174ecbf9ccc8", "5f330e3a96e5a8c9"),
    ("gptq_v2", 8): ("0d00174ecbf9ccc8", "e19135c735421d3b"),
}
# of MLX's packed weight, as auto-round's packer for it writes the same codes
GOLDEN_MLX = {
    2: "af3479a5bfe32c24",
    3: "12269dc8ba8c7347",
    4: "4e39a2e441dd31e7",
    5: "2b026c3db5731461",
    6: "66e4d4bea828c1f2",
    8: "816f4b3c39fcb12f",
}


def golden(bits: int) -> PackedInt:
    """Codes, zero points and scales by formula; no zero point is the lowest code."""
    o, i = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None]
    g, offset = torch.arange(COLUMNS // GROUP)[None], 1 << (bits - 1)
    code_OI = (7 * o + 3 * i + (o * i) // 5) % (1 << bits) - offset
    zero_OG = 1 + (5 * o + 3 * g) % ((1 << bits) - 1) - offset
    scale_OG = (1 + (o + g) % 4) / 64
    return PackedInt(code_OI.to(torch.int8), scale_OG.half(), zero_OG.to(torch.int8), bits)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def section(form: str, spec: QuantSpec, **words: object) -> dict[str, object]:
    return {"quantization_config": {**format_for(form).config_section({"a": spec}, []), **words}}


@pytest.mark.parametrize(("form", "bits"), GOLDEN)
def test_the_bytes_are_those_of_another_packer(form: str, bits: int) -> None:
    packed = golden(bits)
    stored = format_for(form).encode("a.weight", packed)
    assert (digest(stored["a.qweight"]), digest(stored["a.qzeros"])) == GOLDEN[form, bits]
    assert torch.equal(stored["a.scales"].T, packed.scale_OG)


@pytest.mark.parametrize(("form", "bits"), GOLDEN)
def test_what_was_written_is_read(form: str, bits: int) -> None:
    packed = golden(bits)
    writer, spec = format_for(form), packed.spec
    stored = writer.encode("a.weight", packed)
    parts = writer.parts(spec, packed.shape, torch.float16)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    assert found == {f"a.{role}": part for role, part in parts.items()}
    assert writer.names("a.weight", spec) == tuple(stored)
    held = sum(t.numel() * t.element_size() for t in stored.values())
    assert writer.stored_bytes(spec, packed.shape, torch.float16) == held
    index = CompressedIndex.build(section(form, spec), stored)
    assert index is not None
    assert index.modules["a"].spec == spec
    assert index.shape("a", lambda n: tuple(stored[n].shape), stored.__getitem__) == packed.shape
    again = index.decode("a", stored.__getitem__)
    assert torch.equal(again.dequantize(), packed.dequantize())


@given(bits=st.sampled_from([2, 3, 4, 8]), shift=st.integers(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gptq_by_its_definition(bits: int, shift: int, seed: int) -> None:
    """Each code read by itself from the bit stream of its column, in whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    spec, top = QuantSpec(bits=bits, symmetric=False, group_size=32), 1 << bits
    code_OI = torch.randint(0, top, (32, 64), generator=generator)
    zero_OG = torch.randint(shift, top, (32, 2), generator=generator)
    offset = top // 2
    packed = PackedInt(
        (code_OI - offset).to(torch.int8),
        torch.ones(32, 2),
        (zero_OG - offset).to(torch.int8),
        bits,
    )
    stored = format_for("gptq" if shift else "gptq_v2").encode("a.weight", packed)
    row, column, group = (int(torch.randint(0, n, (), generator=generator)) for n in (32, 64, 2))

    def field(words: list[int], place: int) -> int:
        stream = sum((word % 2**32) << (32 * index) for index, word in enumerate(words))
        return stream >> (bits * place) & (top - 1)

    assert field(stored["a.qweight"][:, row].tolist(), column) == code_OI[row, column]
    assert field(stored["a.qzeros"][group].tolist(), row) + shift == zero_OG[row, group]
    assert format_for("gptq").config_section({"a": spec}, [])["bits"] == bits


def test_compressed_tensors_reads_our_awq() -> None:
    packed = golden(4)
    stored = dict(format_for("awq").encode("a.weight", packed))
    converter = AutoAWQConverter(group_size=GROUP, ignore=(), targets=(r"re:.*",))
    theirs = converter.process(stored)
    from pocketlm.formats import compressed_tensors

    ours = compressed_tensors.encode("a.weight", packed)
    assert torch.equal(theirs["a.weight_packed"], ours["a.weight_packed"])
    assert torch.equal(theirs["a.weight_zero_point"], ours["a.weight_zero_point"])
    assert torch.equal(theirs["a.weight_scale"], ours["a.weight_scale"])


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_a_symmetric_grid_is_held_exactly(form: str) -> None:
    packed = golden(4)
    packed = PackedInt(packed.codes_OI, packed.scale_OG, None, 4)
    stored = format_for(form).encode("a.weight", packed)
    assert {int(w) & 0xF for w in stored["a.qzeros"].flatten()} == {7 if form == "gptq" else 8}
    index = CompressedIndex.build(section(form, packed.spec), stored)
    assert index is not None
    found = index.decode("a", stored.__getitem__)
    assert torch.equal(found.dequantize(), packed.dequantize())
    assert index.modules["a"].spec.symmetric == (form != "awq")


def test_scattered_groups_are_sorted_and_written_again() -> None:
    packed, generator = golden(4), torch.Generator().manual_seed(0)
    group_I = torch.randperm(COLUMNS, generator=generator) // GROUP
    weight = sort_by_group(packed, group_I)
    assert isinstance(weight, Permuted)
    scale_OI, zero_OI = packed.scale_OG[:, group_I].float(), packed.zero_OG[:, group_I].float()
    assert torch.equal(weight.dequantize(), scale_OI * (packed.codes_OI.float() - zero_OI))
    stored = format_for("gptq").encode("a.weight", weight)
    assert torch.equal(stored["a.g_idx"].long(), group_I)
    index = CompressedIndex.build(section("gptq", packed.spec, desc_act=True), stored)
    assert index is not None
    again = index.decode("a", stored.__getitem__)
    assert isinstance(again, Permuted)
    assert torch.equal(again.dequantize(), weight.dequantize())
    stored["a.g_idx"][0] = 1 - stored["a.g_idx"][0]
    with pytest.raises(ArtifactError, match=r"g_idx has groups of 31 to 33 columns"):
        index.decode("a", stored.__getitem__)
    stored["a.g_idx"][0] = 2
    with pytest.raises(ArtifactError, match="does not name one of 2 groups"):
        index.decode("a", stored.__getitem__)


def test_files_without_an_order_are_read() -> None:
    packed = golden(4)
    stored = format_for("gptq").encode("a.weight", packed)
    del stored["a.g_idx"]
    index = CompressedIndex.build(section("gptq", packed.spec), stored)
    assert index is not None
    assert torch.equal(index.decode("a", stored.__getitem__).dequantize(), packed.dequantize())


def test_a_convention_that_the_file_does_not_have_is_noticed() -> None:
    packed = PackedInt(golden(4).codes_OI, golden(4).scale_OG, None, 4)
    stored = format_for("gptq_v2").encode("a.weight", packed)
    index = CompressedIndex.build(section("gptq", packed.spec), stored)
    assert index is not None
    with pytest.raises(ArtifactError, match=r"zero points are 9 to 9.*symmetric, which is 8"):
        index.decode("a", stored.__getitem__)


@pytest.mark.parametrize(
    ("packing", "form"),
    [
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:auto_awq", "awq"),
    ],
)
def test_autorounds_own_words_are_read(packing: str, form: str) -> None:
    packed = golden(4)
    stored = format_for(form).encode("m.0.a.weight", packed)
    words = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 16,
        "sym": False,
        "data_type": "int",
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, r"m\.\d+\.a": {}},
    }
    words["extra_config"][r"m\.\d+\.a"] = {"group_size": GROUP}
    index = CompressedIndex.build({"quantization_config": words}, stored)
    assert index is not None
    found = index.decode("m.0.a", stored.__getitem__)
    assert torch.equal(found.dequantize(), packed.dequantize())
    with pytest.raises(UnsupportedModel, match=r"mx_fp.*llm_compressor"):
        CompressedIndex.build({"quantization_config": {**words, "data_type": "mx_fp"}}, stored)


def test_linears_with_other_grids_are_named() -> None:
    usual, other = QuantSpec(group_size=32), QuantSpec(bits=8, group_size=64)
    specs = {f"m.0.{p}_proj": usual for p in ("o", "down", "gate", "up")}
    specs |= {f"m.0.{p}_proj": other for p in "qkv"}
    written = format_for("gptq").config_section(specs, ["m.0.router", "lm_head"])
    assert written["bits"] == 4
    assert list(written["dynamic"]) == [
        r"-:^(?:m\.0\.router)$",
        r"+:^(?:m\.0\.q_proj|m\.0\.k_proj|m\.0\.v_proj|m\.0\.qkv_proj)$",
    ]
    stored = [f"{module}.{role}" for module in specs for role in ("qweight", "qzeros", "scales")]
    index = CompressedIndex.build({"quantization_config": written}, stored)
    assert index is not None
    assert {name: module.spec for name, module in index.modules.items()} == specs
    with pytest.raises(ConfigError, match="one group size for all linears"):
        format_for("awq").config_section(specs, [])
    with pytest.raises(ConfigError, match=r"would take 'm\.0\.gate_proj' for it"):
        format_for("awq").config_section({"m.0.gate_proj": usual}, ["m.0.gate"])


@pytest.mark.parametrize(
    ("form", "spec", "shape", "said"),
    [
        ("gptq", QuantSpec(bits=5, group_size=32), (64, 64), "2, 3, 4 or 8 bits, not 5"),
        ("gptq", QuantSpec(bits=4, group_size=32), (48, 64), "multiples of 32"),
        ("awq", QuantSpec(bits=8, group_size=32), (64, 64), "has 4 bits, not 8"),
        ("awq", QuantSpec(bits=4, group_size=32), (60, 64), "eight outputs"),
        ("mlx", QuantSpec(bits=7, group_size=32), (64, 64), "6, 8 bits, not 7"),
        ("mlx", QuantSpec(bits=4, group_size=16), (64, 64), "128, not 16"),
        ("mlx", QuantSpec(bits=4, group_size=None), (64, 64), "not whole rows"),
        ("awq", QuantSpec(bits=4, type="nf", group_size=64), (64, 64), "integers only, not NF4"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    form: str, spec: QuantSpec, shape: tuple[int, int], said: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=rf"^m: {form} .*{said}"):
        format_for(form).check(spec, shape, where="m")


@pytest.mark.parametrize(("bits", "digest_of"), GOLDEN_MLX.items())
def test_mlx_has_an_offset_for_a_zero_point(bits: int, digest_of: str) -> None:
    packed, writer = golden(bits), format_for("mlx")
    stored = writer.encode("a.weight", packed)
    assert digest(stored["a.weight"].view(torch.int32)) == digest_of
    parts = writer.parts(packed.spec, packed.shape, torch.float16)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    assert found == {f"a.{role}": part for role, part in parts.items()}
    again = writer.decode(stored, "a", packed.spec).dequantize()
    torch.testing.assert_close(again, packed.dequantize(), rtol=0, atol=2**-8)
    symmetric = PackedInt(packed.codes_OI, packed.scale_OG, None, bits)
    stored = writer.encode("a.weight", symmetric)
    again = writer.decode(stored, "a", symmetric.spec).dequantize()
    assert torch.equal(again, symmetric.dequantize())


def test_mlx_names_grids_that_differ() -> None:
    specs = {"a": QuantSpec(group_size=32), "b": QuantSpec(bits=6, group_size=64)}
    specs["c"] = specs["a"]
    assert format_for("mlx").config_section(specs, ["lm_head"]) == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        "b": {"bits": 6, "group_size": 64},
    }


def test_a_zero_point_that_engines_read_differently_is_refused() -> None:
    packed = golden(4)
    packed.zero_OG[3, 1] = -8
    with pytest.raises(ArtifactError, match="gptq_v2"):
        format_for("gptq").encode("a.weight", packed)
    stored = format_for("gptq_v2").encode("a.weight", packed)
    assert int(stored["a.qzeros"][1, 0]) >> 12 & 0xF == 0


@pytest.mark.parametrize(
    ("form", "words", "said"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ("gptq", {"bits": None}, "bits"),
        ("gptq", {"dynamic": {"+:(": {}}}, "cannot be read"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 8}, "8 bits"),
    ],
)
def test_other_layouts_are_refused_by_name(form: str, words: dict[str, object], said: str) -> None:
    stored = format_for(form).encode("a.weight", golden(4))
    with pytest.raises(UnsupportedModel, match=said):
        CompressedIndex.build(section(form, golden(4).spec, **words), stored)


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="awq, compressed-tensors, gptq, pocketlm"):
        CompressedIndex.build({"quantization_config": {"quant_method": "exl3"}}, ["a.weight"])
