"""Artifacts run from packed weights give what their decoded weights give."""

import pytest
import torch
from tests.unit.runtime.helpers import byte_llama, write_twins
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.runtime.dtypes import default_dtype, has_bfloat16_units
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.load import load, packed_summary

W4 = QuantSpec(bits=4, group_size=32)
TINY = {"vocab_size": 257, "tie_word_embeddings": True}


def llama(**options):
    return byte_llama(max_position_embeddings=256, **(TINY | options))


def projections(model, end="_proj"):
    return [name for name, _ in model.named_modules() if name.endswith(end)]


def both_logits(packed, dense, dtype=torch.float32):
    model, _ = load(packed, dtype=dtype)
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model, model(ids).logits.float(), twin(ids).logits.float()


def divergence(truth, found):
    truth, found = truth.log_softmax(-1), found.log_softmax(-1)
    return float((truth.exp() * (truth - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "spec",
    [
        W4,
        QuantSpec(bits=4, group_size=32, symmetric=False),
        QuantSpec(bits=3, group_size=32),
        QuantSpec(bits=8, group_size=None),
    ],
    ids=repr,
)
def test_llama_equals_its_decoded_twin(tmp_path, spec):
    original = llama()
    packed, dense = write_twins(tmp_path, original, dict.fromkeys(projections(original), spec))
    model, ours, truth = both_logits(packed, dense)
    assert divergence(truth, ours) < 1e-8  # float32; the promise is 1e-4
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    summary = packed_summary(model)
    assert summary.linears == 14
    assert not summary.fallbacks
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())


def test_bfloat16_is_as_near_as_dense_bfloat16(tmp_path):
    original = llama()
    packed, dense = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    _, _, truth = both_logits(packed, dense)
    model, ours, twin = both_logits(packed, dense, torch.bfloat16)
    assert packed_summary(model).kernels == {"cpu-int4": 14}
    assert divergence(truth, ours) < 1.5 * divergence(truth, twin) + 1e-4


def test_mixed_grids_untied_head_and_bias(tmp_path):
    original = llama(attention_bias=True, tie_word_embeddings=False)
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    names = projections(original)
    specs = {n: QuantSpec(bits=8, group_size=32) if "down" in n else W4 for n in names[:-3]}
    packed, dense = write_twins(tmp_path, original, specs | {"lm_head": W4})
    model, ours, truth = both_logits(packed, dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.get_submodule(names[-1]), torch.nn.Linear)


def test_gpt2_conv1d(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, n_positions=64)
    original = GPT2LMHeadModel(config).eval()
    names = [n for n, m in original.named_modules() if type(m).__name__ == "Conv1D"]
    specs = {name: W4 for name in names}
    packed, dense = write_twins(tmp_path, original, specs, transposed=True)
    model, ours, truth = both_logits(packed, dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert packed_summary(model).linears == 8


def test_mixtral_experts(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=257,
    )
    original = MixtralForCausalLM(config).eval()
    specs = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}": W4
        for layer in range(2)
        for expert in range(4)
        for part in ("w1", "w2", "w3")
    }
    packed, dense = write_twins(tmp_path, original, specs)
    model, ours, truth = both_logits(packed, dense)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert packed_summary(model).linears == 24


def test_original_loads_the_same_way(tmp_path):
    original = llama()
    _, dense = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    model, ours, truth = both_logits(dense, dense)
    assert packed_summary(model).linears == 0
    torch.testing.assert_close(ours, truth)


def test_generate_of_transformers_works(tmp_path):
    original = llama()
    packed, dense = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    model, _ = load(packed, dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(dense).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))


def test_moving_and_saving_are_refused(tmp_path):
    original = llama()
    packed, _ = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    model, _ = load(packed, dtype=torch.float32)
    model.to("cpu")
    with pytest.raises(ConfigError, match="Load it again"):
        model.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match="is not saved"):
        model.state_dict()


def test_dtype_follows_the_machine(tmp_path):
    original = llama()
    packed, dense = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    bf16, fp32 = torch.bfloat16, torch.float32
    assert load(packed)[0].dtype is (bf16 if vectorised else fp32)
    assert load(dense)[0].dtype is (bf16 if has_bfloat16_units() else fp32)
    assert default_dtype("cuda", int4=False)[0] is bf16


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"device": "toaster"}])
def test_impossible_options(tmp_path, options):
    original = llama()
    packed, _ = write_twins(tmp_path, original, dict.fromkeys(projections(original), W4))
    with pytest.raises(ConfigError):
        load(packed, **options)
