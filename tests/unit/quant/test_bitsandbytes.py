"""NF4 and FP4 are those of bitsandbytes: what it made of one weight is kept beside this file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketlm.core.levels import levels_of
from pocketlm.core.scales import dynamic_map, stored
from pocketlm.core.spec import SCHEMES
from pocketlm.core.tensors import PackedFloat
from pocketlm.quant.grid import minmax_grid, round_to_grid

MADE = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text("utf-8"))


def weight() -> Tensor:
    """Eight rows of fractions that every machine divides alike; small, sparse and tied ones too."""
    places = torch.arange(8 * 128)
    weight_OI = ((places * 7919) % 2003 - 1001).view(8, 128).float() / 1001
    weight_OI[1] *= 1e-3
    weight_OI[2, ::3] = 0
    weight_OI[3] = torch.round(weight_OI[3] * 12) / 12  # on the midpoints of FP4
    return weight_OI


def codes(packed: str) -> Tensor:
    """bitsandbytes puts the first of two codes into the upper half of a byte."""
    data = torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8)
    return torch.stack([data >> 4, data & 0xF], 1).view(8, 128)


@pytest.mark.parametrize(("name", "kind"), [("NF4", "nf4"), ("FP4", "fp4")])
def test_rounding_to_nearest_is_theirs(name: str, kind: str) -> None:
    spec, weight_OI = SCHEMES[name], weight()
    packed = round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.float32), spec)
    assert isinstance(packed, PackedFloat)
    theirs = codes(MADE[kind])
    # Their FP4 has a minus zero, which they give to small positive weights.
    assert torch.equal(levels_of(packed.codes_OI, spec), levels_of(theirs, spec))
    if kind == "nf4":
        assert torch.equal(packed.codes_OI, theirs)
    absmax_OG = weight_OI.view(8, 2, 64).abs().amax(-1)
    assert torch.equal(packed.scale.stored_RG, absmax_OG)
    scale_OI = absmax_OG.repeat_interleave(64, 1)
    assert torch.equal(packed.dequantize(), levels_of(theirs, spec) * scale_OI)


def test_double_quantization_is_theirs() -> None:
    absmax_OG = weight().view(8, 2, 64).abs().amax(-1)
    kept = stored(absmax_OG, SCHEMES["NF4_DQ"], torch.bfloat16)
    made = MADE["double"]
    assert kept.outer is not None
    assert kept.offset is not None
    assert kept.stored_RG.flatten().tolist() == list(bytes.fromhex(made["absmax"]))
    assert kept.outer.tolist() == [float.fromhex(value) for value in made["outer"]]
    assert kept.offset.tolist() == [float.fromhex(made["offset"])]


def test_the_dynamic_map_is_theirs() -> None:
    digest = hashlib.sha256(dynamic_map().numpy().tobytes()).hexdigest()
    assert digest == MADE["dynamic_map_sha256"]
