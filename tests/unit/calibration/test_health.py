"""What is told of calibration windows: repetition, special tokens, joints, short documents."""

from __future__ import annotations

import torch
from tests.unit.calibration.test_windows import byte_tokenizer

from pocketlm.calibration.health import TextHealth, token_health
from pocketlm.calibration.texts import TextSet
from pocketlm.calibration.windows import token_windows


def fresh(windows: int = 8, seq_len: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 49152, (windows, seq_len), generator=generator)


def test_sound_windows_get_no_remark() -> None:
    health = token_health(fresh(), [0, 1])
    assert (health.windows, health.tokens) == (8, 8 * 256)
    assert (health.duplicate_windows, health.repeated_share, health.special_tokens) == (0, 0, 0)
    assert health.remarks() == ()


def test_windows_that_repeat_are_counted() -> None:
    tokens_NT = fresh()
    tokens_NT[3] = tokens_NT[5] = tokens_NT[0]
    health = token_health(tokens_NT, [])
    assert health.duplicate_windows == 2
    assert "2 of 8 calibration windows repeat others." in health.remarks()


def test_repetition_is_found_across_windows_and_places() -> None:
    tokens_NT = fresh(32)
    tokens_NT[16:, 100:228] = tokens_NT[:16, 17:145]  # half of each of the second half
    health = token_health(tokens_NT, [])
    assert health.duplicate_windows == 0
    assert 0.1 < health.repeated_share < 0.35
    assert any("repeats itself" in remark for remark in health.remarks())


def test_special_tokens_are_counted_but_for_the_bos_of_windows() -> None:
    tokens_NT = fresh()
    tokens_NT[:, 0] = 1
    assert token_health(tokens_NT, [0, 1], bos=True).special_tokens == 0
    tokens_NT[:, ::5] = 0
    health = token_health(tokens_NT, [0, 1], bos=True)
    assert health.special_tokens == 8 * 51
    assert any("20% of the calibration tokens are special" in r for r in health.remarks())


def test_the_text_is_accounted_for() -> None:
    long = "\n".join(f"Line {i} of the long document, which says {i * 7919}." for i in range(200))
    paragraph = "A paragraph that stands here twice, and is long enough to count."
    text = TextSet("texts", (long, f"{paragraph}\n\nshort\n\n{paragraph}", "tiny"))
    windows = token_windows(byte_tokenizer(bos=False), text, samples=20, seq_len=64)
    health = windows.health
    assert health is not None
    assert (health.documents, health.short_documents) == (3, 2)
    assert (health.paragraphs, health.duplicate_paragraphs) == (3, 1)
    assert 0 < health.joined_windows < health.windows
    assert TextHealth.model_validate_json(health.model_dump_json()) == health
    assert set(health.facts()) >= {"tokens", "duplicate windows", "windows that join texts"}


def test_a_window_within_one_piece_joins_nothing() -> None:
    text = TextSet("line", ("word " * 40,))  # one piece
    windows = token_windows(byte_tokenizer(bos=False), text, samples=2, seq_len=64)
    assert windows.health is not None
    assert windows.health.joined_windows == 0


def test_remarks_become_notes_of_the_windows() -> None:
    text = TextSet("again", ("The same sentence again and again, word for word.\n" * 100,))
    windows = token_windows(byte_tokenizer(bos=False), text, samples=20, seq_len=100)
    assert any("repeat" in note for note in windows.notes)
