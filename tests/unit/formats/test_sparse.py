"""The sparse layout: what is stored decodes to the same weight, and costs what is planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import SparseSpec, SparsitySpec, parse_weight_spec
from pocketlm.core.tensors import Dense, PackedInt, Sparse
from pocketlm.formats import pocketlm as own
from pocketlm.prune.patterns import kept
from pocketlm.quant.grid import minmax_grid, round_to_grid

GRIDS = {
    "int4": QuantSpec(bits=4, group_size=16),
    "int3": QuantSpec(bits=3, group_size=16),
    "int4-asym": QuantSpec(bits=4, group_size=16, symmetric=False),
    "nvfp4": QuantSpec(type="float", bits=4, group_size=16, scale="e4m3"),
    "fp8": QuantSpec(type="float", bits=8, group_size=None),
    "nf4": QuantSpec(type="nf", bits=4, group_size=16),
    "fp4-dq": QuantSpec(type="bnb_fp", bits=4, group_size=16, scale="dynamic8"),
}


def sparse(values: str, sparsity: str) -> Sparse:
    weight_OI = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))
    spec = SparsitySpec.read(sparsity)
    mask_OI = kept(weight_OI.abs(), spec, "matrix")
    weight_OI = weight_OI * mask_OI
    if values in GRIDS:
        grid = minmax_grid(weight_OI, GRIDS[values], torch.float16)
        return Sparse(round_to_grid(weight_OI, grid, GRIDS[values]), mask_OI, spec.pattern)
    return Sparse(Dense(weight_OI.to(getattr(torch, values))), mask_OI, spec.pattern)


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "4:8", "2:3", "3:16", "0.5", "0.37", "0"])
@pytest.mark.parametrize("values", ["bfloat16", "float32", *GRIDS])
def test_round_trip_and_bytes(values: str, sparsity: str) -> None:
    weight = sparse(values, sparsity)
    stored = own.encode("m.weight", weight)
    assert tuple(stored) == own.names("m.weight", weight.spec)
    scale_dtype = torch.float16
    parts = own.parts(weight.spec, weight.shape, scale_dtype)
    assert {f"m.{role}": (tuple(t.shape), t.dtype) for role, t in (
        (name.removeprefix("m."), tensor) for name, tensor in stored.items()
    )} == {f"m.{role}": part for role, part in parts.items()}  # fmt: skip
    bytes_stored = sum(tensor.nbytes for tensor in stored.values())
    assert own.stored_bytes(weight.spec, weight.shape, scale_dtype) == bytes_stored
    found = own.decode(stored, "m", weight.spec)
    assert isinstance(found, Sparse)
    assert torch.equal(found.mask_OI, weight.mask_OI)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert found.stored_bits == weight.stored_bits == weight.spec.stored_bits((10, 48))
    assert parse_weight_spec(weight.spec.model_dump(mode="json")) == weight.spec


def test_two_of_four_takes_three_bits_a_group() -> None:
    weight = sparse("bfloat16", "2:4")
    assert weight.stored_bits / 480 == 16 / 2 + 3 / 4
    assert sparse("bfloat16", "0.5").stored_bits / 480 == 16 / 2 + 1


def test_a_broken_mask_is_refused() -> None:
    weight = sparse("int4", "2:4")
    assert isinstance(weight.values, PackedInt)
    with pytest.raises(ArtifactError, match="m: a weight that its mask drops is not zero"):
        own.encode("m.weight", dataclasses.replace(weight, mask_OI=~weight.mask_OI))
    more_OI = weight.mask_OI.clone()
    more_OI[0, :4] = True
    with pytest.raises(ArtifactError, match="m: its mask does not keep 2 of every 4"):
        own.encode("m.weight", dataclasses.replace(weight, mask_OI=more_OI))
    stored = own.encode("m.weight", weight)
    told = weight.spec.model_copy(update={"kept": weight.spec.kept - 1})
    with pytest.raises(ArtifactError, match=r"m: .*config\.json says"):
        own.decode(stored, "m", told)
    with pytest.raises(ArtifactError, match=r"'m\.weight_mask' is missing"):
        own.decode({k: v for k, v in stored.items() if "mask" not in k}, "m", weight.spec)


def test_forms_are_told_apart() -> None:
    for data in ({"bits": 4}, {"dtype": "bfloat16"}, {"values": {"bits": 4}, "kept": 3}):
        spec = parse_weight_spec(data)
        assert isinstance(spec, SparseSpec) == ("values" in data)
