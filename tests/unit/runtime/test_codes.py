"""Products of codes against the definition: decoded inputs times decoded weights in float64."""

import pytest
import torch
from tests.unit.runtime.helpers import random_packed, rounded

from pocketlm.core.activations import InputQuantizer, static_quantizer
from pocketlm.core.spec import SCHEMES, ActivationSpec
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.codes import Int8Codes
from pocketlm.runtime.linear import PackedLinear

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DYNAMIC = [
    ActivationSpec(),
    ActivationSpec(symmetric=False),
    ActivationSpec(outliers=1.5),
    ActivationSpec(symmetric=False, outliers=1.5),
    ActivationSpec(outliers=100.0),  # none is that large
]
STATIC = [
    ActivationSpec(granularity="tensor", dynamic=False),
    ActivationSpec(granularity="tensor", dynamic=False, symmetric=False),
]


def quantizer_of(spec: ActivationSpec) -> InputQuantizer:
    if spec.dynamic:
        return InputQuantizer(spec)
    return static_quantizer(torch.tensor(-2.0), torch.tensor(3.0), spec)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spec", [*DYNAMIC, *STATIC], ids=lambda s: f"{s.name}{s.outliers or ''}")
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_int8_codes_equal_the_definition(spec: ActivationSpec, dtype, tokens: int) -> None:
    weight, quantizer = random_packed(50, 96, None, 8), quantizer_of(spec)
    x_MI = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    linear = PackedLinear(weight, None, quantizer, dtype=dtype)
    assert linear.choice.kernel.name == "int8-codes"
    truth_MO = quantizer.encode(x_MI).decode().double() @ weight.dequantize(torch.float64).T
    y_MO = linear(x_MI)
    assert y_MO.dtype is dtype
    assert float((y_MO.double() - truth_MO).norm() / truth_MO.norm()) < TOLERANCE[dtype]


def test_two_large_columns_break_w8a8_and_not_llm_int8() -> None:
    """Against the dense layer, in what tells tokens apart: the large columns are alike in all."""
    generator = torch.Generator().manual_seed(3)
    x_MI = torch.randn(40, 256, generator=generator)
    x_MI[:, [17, 200]] = 120.0
    weight_OI = torch.randn(64, 256, generator=generator) * 0.05
    packed = rounded(weight_OI, SCHEMES["LLM_INT8"])

    def centred(y_MO: torch.Tensor) -> torch.Tensor:
        return y_MO.double() - y_MO.double().mean(0)

    dense_MO, lost = centred(x_MI @ weight_OI.T), {}
    for outliers in (None, 6.0):
        linear = PackedLinear(packed, None, InputQuantizer(ActivationSpec(outliers=outliers)))
        assert linear.choice.kernel.name == "int8-codes"
        lost[outliers] = float((centred(linear(x_MI)) - dense_MO).norm() / dense_MO.norm())
    assert lost[6.0] < 0.015
    assert lost[None] > 0.2


def test_other_kernels_get_inputs_decoded_from_their_codes() -> None:
    weight, quantizer = random_packed(48, 96, 32, 4), InputQuantizer(ActivationSpec())
    x_MI = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    linear = PackedLinear(weight, None, quantizer)
    assert linear.choice.refused["int8-codes"]
    truth_MO = quantizer(x_MI).double() @ weight.dequantize(torch.float64).T
    assert float((linear(x_MI).double() - truth_MO).norm() / truth_MO.norm()) < 2e-6
    assert float((linear(x_MI) - PackedLinear(weight)(x_MI)).norm()) > 0


@pytest.mark.parametrize(
    ("weight", "spec"),
    [
        (random_packed(48, 96, 32, 8), ActivationSpec()),
        (random_packed(48, 96, None, 8, symmetric=False), ActivationSpec()),
        (random_packed(48, 96, None, 4), ActivationSpec()),
        (random_packed(48, 96, None, 8), ActivationSpec(type="float")),
        (random_packed(48, 96, None, 8), ActivationSpec(granularity="group", group_size=32)),
    ],
)
def test_int8_codes_refuse_what_they_cannot_multiply(weight, spec: ActivationSpec) -> None:
    assert Int8Codes().refuses(Grid.of(weight, spec), torch.float32, torch.device("cpu"))
