"""Inputs are rounded as compressed-tensors rounds them, bit for bit in float32."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.core.activations import InputQuantizer, static_quantizer
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import ActivationSpec

DYNAMIC = [
    ActivationSpec(),
    ActivationSpec(symmetric=False),
    ActivationSpec(bits=4),
    ActivationSpec(type="float"),
    ActivationSpec(type="float", granularity="group", group_size=16),
    ActivationSpec(granularity="group", group_size=16, symmetric=False),
]
APART = [ActivationSpec(outliers=6.0), ActivationSpec(outliers=6.0, symmetric=False)]
STATIC = [
    ActivationSpec(granularity="tensor", dynamic=False),
    ActivationSpec(granularity="tensor", dynamic=False, symmetric=False),
    ActivationSpec(granularity="tensor", dynamic=False, type="float"),
]


def arguments(spec: ActivationSpec) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=spec.bits,
        type=spec.type,
        symmetric=spec.symmetric,
        strategy=spec.granularity,
        group_size=spec.group_size,
        dynamic=spec.dynamic,
    )


def inputs(seed: int, outlier: float) -> torch.Tensor:
    """[2, 7, 64]: columns of very different size, one huge value, one token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, 64, generator=generator)
    x *= torch.logspace(-3, 1, 64)
    x[0, 0, seed % 64] = outlier
    x[1, 3] = 0.0
    return x


@pytest.mark.parametrize("spec", DYNAMIC, ids=lambda spec: spec.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), outlier=st.floats(-1e4, 1e4, width=32))
def test_dynamic_rounding_is_the_librarys(spec: ActivationSpec, seed: int, outlier: float) -> None:
    x, args = inputs(seed, outlier), arguments(spec)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(InputQuantizer(spec)(x), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("spec", STATIC, ids=lambda spec: spec.name)
def test_static_rounding_is_the_librarys(spec: ActivationSpec) -> None:
    seen, x, args = inputs(1, -50.0), inputs(2, 200.0), arguments(spec)
    low, high = seen.amin(), seen.amax()
    scale, zero = calculate_qparams(low, high, args)
    quantizer = static_quantizer(low, high, spec)
    assert torch.equal(quantizer.scale, scale)
    assert (quantizer.zero is None) == spec.symmetric
    assert spec.symmetric or torch.equal(quantizer.zero, zero)
    assert torch.equal(quantizer(x), fake_quantize(x, scale, zero, args))
    assert bool((quantizer(x) - x).abs().max() > 100), "what lies outside the range is clamped"


@pytest.mark.parametrize("spec", [*DYNAMIC, *APART, *STATIC], ids=lambda spec: spec.name)
def test_gradients_pass_straight_through(spec: ActivationSpec) -> None:
    x = inputs(3, 30.0)
    quantizer = (
        InputQuantizer(spec) if spec.dynamic else static_quantizer(x.min() / 2, x.max() / 2, spec)
    )
    plain = quantizer(x)
    x.requires_grad_()
    rounded = quantizer(x)
    assert torch.equal(rounded, plain)
    rounded.sum().backward()
    clamped = x.grad == 0
    assert bool((x.grad[~clamped] == 1).all())
    assert bool(clamped.any()) == (not spec.dynamic)
    if not spec.dynamic:
        assert bool((x.detach()[clamped].abs() > x.detach().abs().max() / 4).all())


def test_no_tokens_and_half_precision() -> None:
    quantizer = InputQuantizer(ActivationSpec())
    assert quantizer(torch.empty(0, 8)).shape == (0, 8)
    x = inputs(4, 3.0).bfloat16()
    assert torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


def test_outliers_stay_and_leave_the_scale_to_the_others() -> None:
    x = inputs(5, 200.0)
    codes = InputQuantizer(ActivationSpec(outliers=6.0)).encode(x)
    large = x.abs() >= 6.0
    assert 0 < int(large.sum()) < large.numel() / 2
    assert torch.equal(codes.outliers, torch.where(large, x, 0.0))
    assert torch.equal(codes.decode()[large], x[large])
    others = torch.where(large, 0.0, x)
    step = others.abs().amax(-1, keepdim=True) / 127.5
    assert bool(((codes.decode() - x).abs() <= 0.5001 * step).all())
    plain = InputQuantizer(ActivationSpec())(x)
    assert float((plain - x)[0, 0].abs().max()) > 0.5, "one scale for all loses the small values"
    alone = InputQuantizer(ActivationSpec(outliers=6.0))(x[0, :1])
    assert torch.equal(alone, codes.decode()[0, :1]), "a token does not depend on its neighbours"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "float", "bits": 4}, "8 bits"),
        ({"type": "float", "symmetric": False}, "zero points"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 32}, "group_size"),
        ({"granularity": "tensor"}, "static"),
        ({"dynamic": False}, "dynamic"),
        ({"bits": 9}, "bits"),
        ({"type": "float", "outliers": 6.0}, "outliers"),
        ({"granularity": "tensor", "dynamic": False, "outliers": 6.0}, "outliers"),
        ({"outliers": 0.0}, "outliers"),
        ({"granularty": "token"}, "granularity"),
    ],
)
def test_contradictions_are_errors(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationSpec.parse(data, where="activations")
