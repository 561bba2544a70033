"""The roofline by hand: bytes, operations, what bounds; devices; shapes from config.json alone."""

import json
from xml.etree import ElementTree

import pytest
from transformers import LlamaConfig, MixtralConfig

from pocketlm.core.errors import ConfigError
from pocketlm.evaluate import devices
from pocketlm.evaluate.devices import Device, device, known_devices
from pocketlm.evaluate.roofline import Widths, roofline
from pocketlm.models.shape import model_shape
from pocketlm.report.roofline_plot import draw_plot

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "dtype": "bfloat16",
}
BLOCK = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64  # weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(**SIZES).save_pretrained(path)
    return model_shape(path)


def machine(**measured):
    fields = {"name": "it", "title": "it", "memory_bytes": 1e9, "sources": {}}
    return Device(**fields, bandwidth=1e9, rates={"bf16": 1e12, "int8": 2e12}, **measured)


def test_shape_needs_no_weights(llama):
    assert (llama.blocks, llama.hidden, llama.inner, llama.vocabulary) == (2, 64, 96, 128)
    assert sum(each.count * each.rows * each.columns for each in llama.linears) == 2 * BLOCK
    assert (llama.cache_values, llama.windows, llama.dtype_bits) == (2 * 2 * 16, (None, None), 16)


def test_decoding_reads_weights_once_and_the_cache_for_each_row(llama):
    one = roofline(llama, machine(), batch=1, context=100)
    many = roofline(llama, machine(), batch=4, context=100)
    for found, rows in ((one, 1), (many, 4)):
        weights = sum(operator.weight_bytes for operator in found.decode.operators)
        assert weights == pytest.approx(2 * (2 * BLOCK + 64 * 128) + rows * 64 * 2)  # and ids' rows
        assert found.cache_bytes == rows * 2 * 100 * 64 * 2
        products = sum(o.operations for o in found.decode.operators if "_proj" in o.name)
        assert products == rows * 2 * 2 * BLOCK
        attention = next(o for o in found.decode.operators if o.name == "attention")
        assert attention.operations == rows * 2 * 4 * 100 * 64
    assert all(operator.bound == "memory" for operator in one.decode.operators)
    assert one.decode.seconds == pytest.approx(one.decode.bytes_moved / 1e9)
    assert one.decode.predicted_seconds is None


def test_prefill_is_causal_and_bound_by_compute_past_the_ridge(llama):
    found = roofline(llama, machine(), prompt=4096)
    attention = next(o for o in found.prefill.operators if o.name == "attention")
    assert attention.operations == 2 * 4 * 64 * 4096 * 4097 / 2
    assert found.ridge == 1000
    for operator in found.prefill.operators:
        assert (operator.bound == "compute") == (operator.intensity > found.ridge)


def test_bits_of_weights_activations_and_cache(llama):
    narrow = roofline(llama, machine(), widths=Widths(weights=4.5, head=8, activations=8, cache=4))
    wide = roofline(llama, machine())
    assert (narrow.weight_bits, narrow.head_bits) == (4.5, 8)
    assert narrow.cache_bytes == wide.cache_bytes / 4
    assert narrow.ridge == 2 * wide.ridge  # 8-bit units
    with pytest.raises(ConfigError, match="0 bits of cache"):
        Widths(cache=0)


def test_windows_bound_what_attention_reads(llama):
    from dataclasses import replace

    shape = replace(llama, windows=(None, 10))
    found = roofline(shape, machine(), context=100, prompt=100)
    assert found.cache_bytes == (100 + 10) * 64 * 2
    pairs = {o.name: o.operations / (4 * 64) for o in found.prefill.operators}
    assert pairs["attention, window 10"] == 10 * 11 / 2 + 90 * 10


def test_experts_are_read_as_often_as_they_are_hit(tmp_path):
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    config.save_pretrained(tmp_path)
    shape = model_shape(tmp_path)
    expert = 3 * 96 * 64

    def bytes_of(batch):
        found = roofline(shape, machine(), batch=batch)
        return sum(o.weight_bytes for o in found.decode.operators if "experts" in o.name)

    assert bytes_of(1) == pytest.approx(2 * 2 * expert * 2)  # blocks, bytes, experts
    assert bytes_of(1000) == pytest.approx(2 * 2 * expert * 8)


def test_a_measured_device_predicts_more_than_the_bound(llama):
    found = roofline(llama, machine(product_share=0.5, product_seconds=3e-6, step_seconds=1e-6))
    decode = found.decode
    weights = sum(operator.weight_bytes for operator in decode.operators)
    products = 2 * 4 + 1  # some joined
    others = 1 + 5 + 2 * 2 + 2  # two for attention
    assert decode.predicted_seconds == pytest.approx(
        decode.seconds + weights / 1e9 + products * 3e-6 + others * 1e-6
    )


def test_columns_and_attention_cost_what_they_were_measured_to_cost(llama):
    parts = {"product_share": 1.0, "product_seconds": 3e-6, "step_seconds": 1e-6}
    plain = roofline(llama, machine(**parts)).decode.predicted_seconds
    wide = roofline(llama, machine(**parts, column_seconds=1e-8)).decode.predicted_seconds
    columns = 2 * (64 + 64 + 64 + 96) + 64  # joined products once: qkv, output, gate and up, down
    assert plain is not None
    assert wide == pytest.approx(plain + columns * 1e-8)
    slow = roofline(llama, machine(**parts, attention_seconds=5e-6)).decode.predicted_seconds
    assert slow == pytest.approx(plain + 2 * 4e-6)


def test_a_line_through_products_is_not_steeper_than_the_memory():
    def cost(small, large, longer):  # seconds of 1 and 4 GB, of 4096 columns
        found = devices._line((1e9, small), (4e9, large), longer, 4096, 8192, 1e-3, 1e9)
        return found.rate, found.seconds + 4096 * found.column_seconds, found.column_seconds

    assert cost(2.101, 8.101, 0.0) == pytest.approx((0.5e9, 0.1, 0.0))
    rate, beyond, _ = cost(2.101, 4.101, 0.0)  # the small one leaves part of the device idle
    assert rate == 1e9
    assert beyond == pytest.approx((1.1 + 0.1) / 2)
    assert cost(3.0, 2.9, 0.0)[0] == 1e9  # a busy machine
    assert cost(2.101, 8.101, 0.08192) == pytest.approx((0.5e9, 0.1, 1e-5))
    assert cost(2.101, 8.101, 8192.0)[1:] == pytest.approx((0.1, 0.1 / 4096))


def test_every_number_of_a_device_names_its_source():
    for name, known in known_devices().items():
        assert set(known.sources) == {"memory", "bandwidth", *known.rates}, name
        assert all(known.sources.values())
        assert known.rate("bf16") > known.bandwidth  # units: operations and bytes, not teras
    assert known_devices()["h100"].rate("bf16") == 989.5e12  # dense
    assert known_devices()["h100"].rate("fp4") == 989.5e12  # has none: runs as bf16


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown device 'h1000'.*h100, h200") as error:
        device("h1000")
    assert error.value.exit_code == 2


def test_plot_and_json(llama):
    found = roofline(llama, device("h100"))
    drawing = ElementTree.fromstring(draw_plot(found))
    circles = [part for part in drawing.iter() if part.tag.endswith("circle")]
    drawn = [o for p in (found.prefill, found.decode) for o in p.operators if o.operations]
    assert len(circles) == len(drawn) + 2
    assert type(found).model_validate(json.loads(found.model_dump_json())) == found
