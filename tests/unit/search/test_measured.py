"""Errors and divergences of the stream against the whole model in memory."""

from __future__ import annotations

import pytest
import torch
from tests.unit.search.test_units import units_of
from torch import nn
from transformers import AutoModelForCausalLM

from pocketlm.core.spec import QuantSpec
from pocketlm.models import open_model
from pocketlm.search import divergence
from pocketlm.search.divergence import Variant, Work, measure_divergences, passes
from pocketlm.search.errors import Energy, measure_energies, relative_error
from pocketlm.search.quick import gathered, quantized
from pocketlm.search.units import Candidate

SPEC = QuantSpec(bits=3, group_size=32)


def inputs_of(whole: nn.Module, tokens_NT, names) -> dict[str, torch.Tensor]:
    """What each linear reads in a plain forward pass."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        whole.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        whole(tokens_NT)
    for handle in handles:
        handle.remove()
    return seen


def test_errors_are_those_of_the_outputs(llama, model, windows):
    names = ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"]
    found: dict[str, Energy] = {}
    measure_energies(
        model, windows.tokens_NT, {name: [SPEC] for name in names},
        lambda name, spec, energy: found.__setitem__(name, energy), lambda index: None,
    )  # fmt: skip
    whole = AutoModelForCausalLM.from_pretrained(llama)
    for name, x_BTI in inputs_of(whole, windows.tokens_NT, names).items():
        block = model.block(int(name.split(".")[2]))
        with block as loaded:
            view = loaded.linears[name]
            weight_OI = view.weight_OI()
            rounded_OI = quantized(view, weight_OI, SPEC, gathered(x_BTI, model.device))
        lost = (x_BTI @ (weight_OI - rounded_OI).T).square().sum()
        assert found[name].lost == pytest.approx(float(lost), rel=1e-3)
        assert found[name].whole == pytest.approx(
            float((x_BTI @ weight_OI.T).square().sum()), rel=1e-3
        )
        assert found[name].tokens == windows.tokens_NT.numel()


def naive_kl(path, tokens_NT, changed: dict[str, torch.Tensor]) -> float:
    """KL with some weights replaced, all in memory."""
    whole = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        original = whole(tokens_NT).logits[:, :-1].log_softmax(-1)
        for name, weight_OI in changed.items():
            whole.get_submodule(name).weight.copy_(weight_OI)
        other = whole(tokens_NT).logits[:, :-1].log_softmax(-1)
    return float((original.exp() * (original - other)).sum(-1).mean())


def test_divergences_are_those_of_the_whole_model(llama, model, windows, recipe, monkeypatch):
    units = units_of(model, recipe, "vllm", [QuantSpec(bits=4, group_size=32)])
    variants = [Variant(unit, unit.candidates[0]) for unit in units]
    found: dict[Variant, float] = {}
    work = [0]

    def step(products: int) -> None:
        work[0] += products

    measure_divergences(model, windows.tokens_NT, variants, found.__setitem__, step)
    assert list(found) == variants
    expected = sum(map(Work(model, windows.tokens_NT.numel()).of, variants))
    assert work[0] == pytest.approx(expected, rel=0.01)
    whole = AutoModelForCausalLM.from_pretrained(llama)
    for variant in (variants[0], variants[5], variants[-1]):  # q, k, v; o; down
        inputs = inputs_of(whole, windows.tokens_NT, variant.unit.linears)
        changed = {}
        with model.block(variant.unit.block) as block:
            for name in variant.unit.linears:
                view = block.linears[name]
                hessian = gathered(inputs[name], model.device)
                spec = variant.candidate.specs[name]
                changed[name] = quantized(view, view.weight_OI(), spec, hessian)
        expected = naive_kl(llama, windows.tokens_NT, changed)
        assert expected > 1e-5
        assert found[variant] == pytest.approx(expected, rel=0.02)
    # The same from passes of one block each, and the original's weights are back in place.
    monkeypatch.setattr(divergence, "HELD_MOST", 1)
    assert len(passes(model, variants, windows.tokens_NT.numel())) == 3
    again: dict[Variant, float] = {}
    measure_divergences(model, windows.tokens_NT, variants, again.__setitem__, step)
    assert list(again.values()) == pytest.approx(list(found.values()), rel=1e-5)


def test_experts_are_measured_together(mixtral, windows, recipe):
    model = open_model(mixtral)
    experts = [u for u in units_of(model, recipe, "transformers") if "experts" in u.name]
    variants = [Variant(experts[1], experts[1].candidates[index]) for index in (1, 5)]
    found: dict[Variant, float] = {}
    measure_divergences(
        model, windows.tokens_NT, variants, found.__setitem__, lambda products: None
    )
    coarse, fine = found.values()
    assert coarse > 10 * fine > 0


def test_an_expert_without_tokens_counts_for_nothing_beside_others():
    candidate = Candidate(SPEC, {"a": SPEC, "b": SPEC}, 1, 1)
    seen = {"a": Energy(1.0, 10.0, 5), "b": Energy(8.0, 10.0, 0)}
    assert relative_error(candidate, lambda name, spec: seen[name]) == (0.1, True)
    unseen = {"a": Energy(2.0, 10.0, 0), "b": Energy(8.0, 10.0, 0)}
    assert relative_error(candidate, lambda name, spec: unseen[name]) == (0.5, False)
