"""CUDA kernels against the definition; run with ``pytest -m gpu tests/gpu``."""

import pytest
import torch
from tests.unit.runtime.helpers import random_packed, write_twins
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm.core.spec import QuantSpec
from pocketlm.runtime.generate import generate
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.cuda import Int4Cuda
from pocketlm.runtime.kernels.reference import Reference
from pocketlm.runtime.kernels.select import kernel_for
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.load import load, packed_summary

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SHAPES = [(64, 128, 32), (576, 576, 64), (1536, 576, 64), (576, 1536, 128), (256, 576, None)]


def error(kernel, weight, dtype, tokens):
    grid = Grid.of(weight)
    x_MI = torch.randn(tokens, grid.columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y_MO = kernel.matmul(x_MI.to(CUDA), kernel.pack(weight, dtype, CUDA), grid)
    truth_MO = x_MI.double() @ weight.dequantize(torch.float64).T
    return float((y_MO.cpu().double() - truth_MO).norm() / truth_MO.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_equals_definition(bits, symmetric):
    for rows, columns, group in SHAPES:
        weight = random_packed(rows, columns, group, bits, symmetric)
        assert Int4Cuda().refuses(Grid.of(weight), torch.bfloat16, CUDA) is None
        for tokens in (1, 7, 33, 200):
            assert error(Int4Cuda(), weight, torch.bfloat16, tokens) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_reference_equals_definition(bits, dtype):
    tolerance = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for rows, columns, group in SHAPES:
        weight = random_packed(rows, columns, group, bits, symmetric=False)
        assert error(Reference(), weight, dtype, 5) < tolerance


def test_float32_activations_go_to_reference():
    choice = kernel_for(Grid(64, 128, 4, 32, True), torch.float32, CUDA)
    assert choice.kernel.name == "reference"
    groups_of_16 = kernel_for(Grid(64, 128, 4, 16, True), torch.bfloat16, CUDA)
    assert groups_of_16.kernel.name == "reference"
    assert "groups of 16" in groups_of_16.refused["triton"]


def test_no_dequantised_copy():
    weight = random_packed(1024, 2048, 64, 4)
    linear = PackedLinear(weight, dtype=torch.bfloat16, device=CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    linear(torch.randn(4, 2048, dtype=torch.bfloat16, device=CUDA))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1 << 20
    assert linear.packed_bytes < 0.35 * 2 * 1024 * 2048


def test_model_runs_packed(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        initializer_range=0.3,
    )
    original = LlamaForCausalLM(config).eval()
    names = [name for name, _ in original.named_modules() if name.endswith("_proj")]
    specs = dict.fromkeys(names, QuantSpec(bits=4, group_size=64))
    packed, dense = write_twins(tmp_path, original, specs)
    model, tokenizer = load(packed, device="cuda")
    twin, _ = load(dense, device="cuda", dtype=torch.bfloat16)
    truth, _ = load(dense, device="cpu", dtype=torch.float32)
    assert packed_summary(model).kernels == {"triton": 14}
    ids = torch.randint(0, 257, (2, 40), device=CUDA)
    with torch.inference_mode():
        ours, theirs, exact = (
            m(ids.to(m.device)).logits.float().cpu() for m in (model, twin, truth)
        )
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
    assert len(generate(model, tokenizer, "hello", max_new_tokens=8).tokens) > 0
