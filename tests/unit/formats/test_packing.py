"""The bit layout, against compressed-tensors' own packing and against the definition."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.core.errors import ArtifactError
from pocketlm.formats import packing

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 64, 100, 576])
def test_words_are_those_of_the_library(bits: int, columns: int) -> None:
    torch.manual_seed(bits)
    codes = random_codes(37, columns, bits)
    words = packing.pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert packing.padding_is_zero(words, bits, columns)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), columns=st.integers(1, 90))
def test_code_i_lies_at_bit_i_times_bits(bits: int, rows: int, columns: int) -> None:
    codes = random_codes(rows, columns, bits)
    words = packing.pack(codes, bits)
    for row in range(rows):
        stream = int.from_bytes(words[row].numpy().tobytes(), "little")
        for i in range(columns):
            code = (stream >> (i * bits)) & ((1 << bits) - 1)
            assert code - (1 << (bits - 1)) == int(codes[row, i])
        assert stream >> (columns * bits) == 0


@pytest.mark.parametrize("bits", BITS)
def test_chunks_of_rows_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(50, 70, bits)
    whole = packing.pack(codes, bits)
    monkeypatch.setattr(packing, "CODES_AT_ONCE", 200)
    assert torch.equal(packing.pack(codes, bits), whole)
    assert torch.equal(packing.unpack(whole, bits, 70), codes)


def test_a_transposed_view_is_packed_as_it_reads() -> None:
    codes = random_codes(64, 32, 4)
    assert torch.equal(packing.pack(codes.T, 4), packing.pack(codes.T.contiguous(), 4))


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArtifactError, match="from -9 to 0 and do not fit into 4 bits"):
        packing.pack(torch.tensor([[-9, 0]], dtype=torch.int8), 4)
    with pytest.raises(ArtifactError, match=r"torch\.int8"):
        packing.pack(torch.zeros(2, 2), 4)


def test_a_wrong_width_is_refused() -> None:
    words = packing.pack(random_codes(4, 64, 3), 3)
    with pytest.raises(ArtifactError, match="rows of 6 words where 70 codes of 3 bits take 7"):
        packing.unpack(words, 3, 70)


def test_dirty_padding_is_seen() -> None:
    words = packing.pack(random_codes(4, 33, 3), 3)
    words[2, -1] |= 1 << 20
    assert not packing.padding_is_zero(words, 3, 33)
