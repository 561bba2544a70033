"""Steps over the static cache: transformers' greedy tokens, for every family and several rows."""

import sys

import pytest
import torch
from tests.unit.models.families import FAMILIES, build
from tests.unit.runtime.helpers import convolutional, random_packed
from torch import nn

from pocketlm.models.static_cache import refuses_static
from pocketlm.runtime import decode, lean, native
from pocketlm.runtime.decode import Decoder
from pocketlm.runtime.joined import joined
from pocketlm.runtime.lean import LeanStep
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.native.pages import settle
from pocketlm.runtime.native.step import NativeStep
from pocketlm.runtime.sampling import Sampling

NEW = 8  # the window of 5 slides
PROMPT = [5, 9, 31, 7, 62, 11]
PLAIN = ("llama", "llama-bias-tied", "qwen2", "qwen3", "mistral-window")
no_compiler = pytest.mark.skipif(isinstance(native.library(), str), reason=str(native.library()))


def theirs(model, ids):
    ids = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


def ours(decoder, rows):
    tokens = [decoder.prefill(rows, room=NEW).read()]
    tokens += [decoder.step().read() for _ in range(NEW - 1)]
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_transformers(family):
    model = build(family)
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    assert decoder.length == len(PROMPT) + NEW - 1
    assert ("transformers' forward" in decoder.loop) == (family not in PLAIN)
    decoder.cut(3)
    assert ours(decoder, [PROMPT[3:]]) == [theirs(model, PROMPT)]


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "olmo2", "mixtral"])
def test_rows_of_several_lengths(family):
    model = build(family)
    rows = [PROMPT, PROMPT[2:], PROMPT[1:4] * 3]
    assert ours(Decoder(model, 3), rows) == [theirs(model, row) for row in rows]


def logits_of_all_ways(model, rows):
    """One step: the model's own forward, the lean step, both with places on the device, C."""
    decoder = Decoder(model, len(rows), lean=False)
    decoder.prefill(rows, room=NEW).read()
    found = {}
    with torch.inference_mode():
        found["own"] = decoder._eager_step()
        decoder.length -= 1
        with decoder._at_slot(256):
            found["own at slot"] = decoder._logits_at_slot()
        decoder._lean_on = True
        decoder._try_lean()
        native_step = decoder._lean
        step = LeanStep(decoder_parts_of(model), decoder._cache)
        found["lean"] = step.at(decoder.tokens_B, decoder.length, decoder._pads())
        with decoder._at_slot(256):
            decoder._lean = step
            found["lean at slot"] = decoder._logits_at_slot()
        if isinstance(native_step, NativeStep):
            place = (decoder.tokens_B, decoder.length, decoder._pads())
            found["C"] = native_step.at(*place)
    return found


def decoder_parts_of(model):
    from pocketlm.models.decoder_parts import decoder_parts

    parts = decoder_parts(model)
    assert not isinstance(parts, str)
    return parts


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, PROMPT[3:]]])
@pytest.mark.parametrize("family", PLAIN)
def test_all_ways_give_the_same_logits(family, rows):
    found = logits_of_all_ways(build(family), rows)
    truth = found.pop("own")
    assert len(found) == 3 + (not isinstance(native.library(), str))
    for way, logits in found.items():
        assert torch.allclose(logits, truth, rtol=1e-3, atol=1e-4), way


@pytest.mark.parametrize("held", [0, 2, 5])
@pytest.mark.parametrize("rows", [[PROMPT * 2], [PROMPT * 2, PROMPT[3:] * 2, PROMPT]])
@pytest.mark.parametrize("family", PLAIN)
def test_lean_prompts_give_the_same_logits_and_keys(family, rows, held):
    """As a whole and behind what the cache holds, padded or not; the window of 5 slides."""
    model = build(family)
    decoder = Decoder(model, len(rows), lean=False)
    decoder.prefill(rows, room=NEW).read()
    step = LeanStep(decoder_parts_of(model), decoder._cache)
    real = [[0] * (12 - len(row)) + row for row in rows]
    decoder.length = held
    with torch.inference_mode():
        truth = decoder._forward(torch.tensor(real)[:, held:])
        keys = [part.keys.clone() for part in decoder._cache.parts]
        for part in decoder._cache.parts:
            part.keys[:, :, held:12] = part.values[:, :, held:12] = 7.0
        ours = step.prompt(torch.tensor(real)[:, held:], held, decoder._pads())
    assert torch.allclose(ours, truth, rtol=1e-3, atol=1e-4)
    for row, ids in enumerate(rows):
        for part, theirs in zip(decoder._cache.parts, keys, strict=True):
            begin = max(held, 12 - len(ids))
            assert torch.allclose(part.keys[row, :, begin:12], theirs[row, :, begin:12], atol=1e-4)


def without_c(monkeypatch):
    monkeypatch.setattr(native.step, "native_step", lambda *_: "there is none here")
    monkeypatch.setattr(decode, "LEAN_PROMPTS", ("cpu",))


@pytest.mark.parametrize("chunk", [4, 4096])
@pytest.mark.parametrize("rows", [[PROMPT * 2], [PROMPT * 2, PROMPT[2:], PROMPT]])
def test_lean_prompts_write_the_same_tokens(monkeypatch, rows, chunk):
    without_c(monkeypatch)
    monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(decode, "LEAST_CHUNK", 4)
    monkeypatch.setattr(decode, "TRIED_TOKENS", 3)
    asked = []
    prompt = LeanStep.prompt

    def counted(self, ids_BT, *place):
        asked.append(ids_BT.shape[1])
        return prompt(self, ids_BT, *place)

    monkeypatch.setattr(LeanStep, "prompt", counted)
    model = build("mistral-window")
    decoder = Decoder(model, len(rows))
    assert ours(decoder, rows) == [theirs(model, row) for row in rows]
    # tried first, on its beginning, in two parts
    assert asked == ([1, 2, 4, 4, 4] if chunk == 4 else [1, 2, 12])
    decoder.cut(0)
    assert ours(decoder, rows) == [theirs(model, row) for row in rows]
    assert len(asked) == (8 if chunk == 4 else 4)  # and not again


@pytest.mark.parametrize("fault", ["is off", "fails"])
def test_a_lean_prompt_that_is_off_is_not_trusted(monkeypatch, fault):
    without_c(monkeypatch)

    def wrong(self, ids_BT, *_):
        if fault == "fails":
            raise RuntimeError("no such kernel")
        return torch.ones(len(ids_BT), 96)

    monkeypatch.setattr(LeanStep, "prompt", wrong)
    model = build("llama")
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    said = "logits are off by" if fault == "is off" else "RuntimeError: no such kernel"
    assert any("prompts run" in note and said in note for note in decoder.notes)
    assert "the lean step" in decoder.loop


@no_compiler
@pytest.mark.parametrize(  # PyTorch's int8 product has no zero points
    ("bits", "symmetric"), [(2, True), (2, False), (4, True), (4, False), (8, True)]
)
def test_step_in_c_reads_packed_weights(bits, symmetric):
    model = build("llama", torch.bfloat16, hidden_size=128, intermediate_size=192, head_dim=32)
    torch.manual_seed(1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            group = None if bits == 8 else 64
            packed = random_packed(rows, columns, group, bits, symmetric)
            packed = type(packed)(packed.codes_OI, packed.scale_OG * 0.02, packed.zero_OG, bits)
            model.set_submodule(name, PackedLinear(packed, dtype=torch.bfloat16))
    found = logits_of_all_ways(model, [PROMPT])
    error = (found["C"] - found["own"].float()).norm() / found["own"].float().norm()
    assert error < 0.03  # activations here are float32, there bfloat16
    assert "step in C" in loop_of(model)


@no_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_in_c_takes_any_width(dtype):
    """Rows beyond the last four, columns beyond the last vector."""
    model = build("llama", dtype, hidden_size=44, intermediate_size=51, head_dim=10, vocab_size=97)
    found = logits_of_all_ways(model, [PROMPT])
    error = (found["C"] - found["own"].float()).norm() / found["own"].float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


def loop_of(model):
    decoder = Decoder(model)
    decoder.prefill([PROMPT], room=2).read()
    decoder.step()
    return decoder.loop


def test_what_is_off_is_not_trusted(monkeypatch):
    monkeypatch.setattr(LeanStep, "at", lambda self, ids, *_: torch.ones(len(ids), 96))
    monkeypatch.setattr(NativeStep, "at", lambda self, ids, *_: torch.ones(len(ids), 96))
    model = build("llama")
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    assert any("logits are off by" in note for note in decoder.notes)


def test_without_a_compiler_steps_run_in_torch(monkeypatch):
    monkeypatch.setattr(
        "pocketlm.runtime.native.step.library", lambda: "there is no C compiler (cc)"
    )
    decoder = Decoder(build("qwen2"))
    ours(decoder, [PROMPT])
    assert decoder.notes == ["no step in C: there is no C compiler (cc)."]
    assert decoder.loop == "the lean step over a static cache"


def test_missing_kernels_of_a_gpu_are_told(monkeypatch):
    plain = LeanStep.__init__

    def on_a_gpu_without_triton(self, *arguments, **options):
        plain(self, *arguments, **options)
        self.kernels, self.no_kernels = lean._kernels(self.heads[2], self.cos_ND)

    monkeypatch.setitem(sys.modules, "pocketlm.runtime.decode_kernels", None)
    monkeypatch.setattr(LeanStep, "__init__", on_a_gpu_without_triton)
    monkeypatch.setattr("pocketlm.runtime.native.step.library", lambda: "none")
    model = build("llama")
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    assert any("PyTorch's operations: needs Triton" in note for note in decoder.notes)


def test_other_state_falls_back_to_the_dynamic_cache():
    model = convolutional()
    assert "LinearAttention" in refuses_static(model)
    decoder = Decoder(model)
    assert ours(decoder, [PROMPT]) == [theirs(model, PROMPT)]
    assert "no static cache" in decoder.notes[0]


def test_the_cache_grows_and_keeps_what_it_holds():
    model = build("gemma2", max_position_embeddings=1024)
    decoder, long = Decoder(model), [3 + i % 90 for i in range(254)]
    decoder.prefill([long]).read()
    assert decoder._cache.capacity == 256
    tokens = [decoder.step().read()[0] for _ in range(6)]
    assert decoder._cache.capacity == 512
    whole = Decoder(model)
    whole.prefill([long], room=300).read()
    assert tokens == [whole.step().read()[0] for _ in range(6)]


def test_seed_decides_what_is_drawn():
    model = build("llama")

    def drawn(seed):
        decoder = Decoder(model, sampling=Sampling(1.0, top_k=40, top_p=0.95), seed=seed)
        return ours(decoder, [PROMPT])

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("rows", [(64, 128), (128, 192, 64)])
@pytest.mark.parametrize("bits", [4, 8])
def test_joined_linears_are_the_single_ones(rows, bits):
    group = 32 if bits == 4 else None
    singles = [
        PackedLinear(random_packed(count, 64, group, bits), dtype=torch.bfloat16) for count in rows
    ]
    x = torch.randn(3, 64).bfloat16()
    before = torch.cat([single(x) for single in singles], -1)
    one = joined(singles)
    assert torch.equal(one(x), before)
    assert torch.equal(torch.cat([single(x) for single in singles], -1), before)
    taken = {b.untyped_storage().data_ptr() for s in singles for b in s.buffers()}
    assert one.get_buffer("packed" if bits == 4 else "codes_OI").data_ptr() in taken


def test_settled_weights_are_the_same_and_join_without_a_copy():
    weights = [random_packed(rows, 4096, None, 8) for rows in (512, 256)]
    linears = [PackedLinear(weight, dtype=torch.bfloat16) for weight in weights]
    codes = [weight.codes_OI.clone() for weight in weights]
    held = [linear.get_buffer("codes_OI") for linear in linears]
    settle(held)
    assert [tensor.data_ptr() % 64 for tensor in held] == [0, 0]
    for expected, linear in zip(codes, linears, strict=True):
        assert torch.equal(expected, linear.get_buffer("codes_OI"))
    places = [tensor.data_ptr() for tensor in held]
    settle(held)
    one = joined(linears)
    assert [tensor.data_ptr() for tensor in held] == places
    assert one.get_buffer("codes_OI").data_ptr() == places[0]
    assert torch.equal(one.get_buffer("codes_OI"), torch.cat(codes))


def test_what_cannot_be_joined_stays_apart():
    dense = nn.Linear(64, 64)
    packed = PackedLinear(random_packed(64, 64, 32, 4), dtype=torch.bfloat16)
    other = PackedLinear(random_packed(64, 64, 64, 4), dtype=torch.bfloat16)
    assert joined([dense, packed]) is None
    assert joined([packed, other]) is None
