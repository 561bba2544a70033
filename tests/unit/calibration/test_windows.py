"""Token windows: shapes, seeds, BOS, and what is announced or refused."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pocketlm.calibration.texts import TextSet, load_text
from pocketlm.calibration.tokens import prefix_ids
from pocketlm.calibration.windows import eval_windows, token_windows
from pocketlm.core.errors import CalibrationError, ConfigError


def byte_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte; "<s>" (id 256) before each text where `bos`."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**vocabulary, "<s>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TEXT = TextSet("lines", ("\n".join(f"Line {i} says {i * i}." for i in range(400)),))


def test_successive_windows_spell_the_text() -> None:
    tokenizer = byte_tokenizer(bos=False)
    windows = eval_windows(tokenizer, TEXT, seq_len=50)
    assert windows.tokens_NT.shape == (len(TEXT.joined) // 50, 50)
    assert windows.tokens_NT.dtype == torch.int64
    spelt = tokenizer.decode(windows.tokens_NT.flatten())
    assert TEXT.joined.startswith(spelt)
    assert not windows.bos
    assert windows.notes == ()


def test_a_limit_gives_the_same_first_windows() -> None:
    tokenizer = byte_tokenizer(bos=True)
    everything, few = (eval_windows(tokenizer, TEXT, 50, limit) for limit in (None, 3))
    assert torch.equal(everything.tokens_NT[:3], few.tokens_NT)
    assert few.sha256 != everything.sha256


def test_bos_starts_each_window_where_the_tokenizer_adds_it() -> None:
    tokenizer = byte_tokenizer(bos=True)
    assert prefix_ids(tokenizer) == [256]
    for windows in (eval_windows(tokenizer, TEXT, 50), token_windows(tokenizer, TEXT, 5, 50)):
        assert windows.bos
        assert (windows.tokens_NT[:, 0] == 256).all()
        assert (windows.tokens_NT[:, 1:] != 256).all()
    spelt = tokenizer.decode(eval_windows(tokenizer, TEXT, 50).tokens_NT[:, 1:].flatten())
    assert TEXT.joined.startswith(spelt)


def test_a_bos_in_the_text_is_not_doubled() -> None:
    chats = TextSet("chats", ("<s>" + "hello " * 30,) * 2, separator="")
    first = eval_windows(byte_tokenizer(bos=True), chats, 60).tokens_NT[0]
    assert (first == 256).sum() == 1


def test_sampled_windows_follow_the_seed_and_stay_in_the_text() -> None:
    tokenizer = byte_tokenizer(bos=False)
    windows = token_windows(tokenizer, TEXT, samples=6, seq_len=64, seed=1)
    assert windows.tokens_NT.shape == (6, 64)
    assert windows.sha256 == token_windows(tokenizer, TEXT, 6, 64, seed=1).sha256
    assert windows.sha256 != token_windows(tokenizer, TEXT, 6, 64, seed=2).sha256
    lines = set(TEXT.joined.split("\n"))
    for row in windows.tokens_NT:
        inner = tokenizer.decode(row).split("\n")[1:-1]
        assert inner
        assert set(inner) <= lines


def test_every_token_of_a_short_text_is_used_once() -> None:
    tokenizer = byte_tokenizer(bos=False)
    windows = token_windows(tokenizer, TEXT, samples=10_000, seq_len=64)
    total = len(TEXT.joined)
    assert windows.tokens_NT.shape[0] == total // 64
    assert f"on {total // 64} windows of 64 tokens, not 10000" in windows.notes[0]
    assert f"{total} tokens" in windows.notes[0]


def test_text_without_line_ends_is_cut_too() -> None:
    text = TextSet("flat", ("word " * 5000,))
    windows = token_windows(byte_tokenizer(bos=False), text, samples=20, seq_len=128)
    assert windows.tokens_NT.shape == (20, 128)


def test_the_context_limits_windows_and_says_so() -> None:
    tokenizer = byte_tokenizer(bos=False)
    for windows in (
        token_windows(tokenizer, TEXT, 2, 4096, context=128),
        eval_windows(tokenizer, TEXT, 4096, 2, context=128),
    ):
        assert windows.tokens_NT.shape == (2, 128)
        assert "windows of 128 tokens, not 4096" in windows.notes[0]


def test_too_short_a_text_says_how_much_was_needed() -> None:
    short = TextSet("short", ("twelve chars",))
    for take in (lambda t: token_windows(t, short, 4, 64), lambda t: eval_windows(t, short, 64)):
        with pytest.raises(CalibrationError, match="has 12 tokens; one window needs 64"):
            take(byte_tokenizer(bos=False))


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 64), (-1, 64), (4, 0), (4, 1)])
def test_senseless_counts_are_refused(samples: int, seq_len: int) -> None:
    with pytest.raises(ConfigError, match="Ask for at least"):
        token_windows(byte_tokenizer(bos=False), TEXT, samples, seq_len)


def test_notes_of_the_text_are_passed_on() -> None:
    text = TextSet("noted", load_text("builtin").documents[:50], notes=("left out",))
    assert "left out" in token_windows(byte_tokenizer(bos=False), text, 1, 64).notes
