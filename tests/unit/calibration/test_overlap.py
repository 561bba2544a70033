"""Overlap between what was calibrated on and what is evaluated, by runs of tokens."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from pocketlm.calibration.overlap import overlap_warning
from pocketlm.calibration.record import hashes_file, read_hashes
from pocketlm.calibration.runs import CLASS, run_hashes
from pocketlm.calibration.texts import load_text
from pocketlm.calibration.windows import Windows


def windows(tokens_NT: Tensor, sha256: str = "1" * 64) -> Windows:
    return Windows(tokens_NT, "prose", sha256, False, None)


def stream(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 49152, (tokens,), generator=torch.Generator().manual_seed(seed))


def warning(calibration_NT: Tensor, evaluation_NT: Tensor) -> str | None:
    known = read_hashes(hashes_file(windows(calibration_NT)))
    return overlap_warning("other prose", "2" * 64, known, windows(evaluation_NT))


def test_one_run_of_so_many_is_kept() -> None:
    count = len(run_hashes(stream(64 * 1024).view(64, -1)))
    assert count == pytest.approx(64 * 1024 / CLASS, rel=0.1)


def test_a_shared_part_is_found_wherever_it_stands() -> None:
    text = stream(52_000)
    calibration_NT = text[:32_768].view(16, -1)
    half_NT = text[16_395 : 16_395 + 32_768].view(4, -1)  # half of it, in other windows
    found = warning(calibration_NT, half_NT)
    assert found is not None
    assert 40 <= int(found.split("%")[0]) <= 60
    assert warning(calibration_NT, text[32_768:].view(4, -1)) is None


def test_little_is_tolerated() -> None:
    text = stream(200_000)
    evaluation_NT = text[99_500:199_500].view(50, -1)  # half a hundredth is shared
    assert warning(text[:100_000].view(50, -1), evaluation_NT) is None


def test_the_same_text_is_named_whatever_was_read_of_it() -> None:
    known = run_hashes(stream(1000).view(1, -1))
    found = overlap_warning("prose", "1" * 64, known, windows(stream(1000, seed=1).view(1, -1)))
    assert found == "the evaluation text prose is the calibration text."


def test_windows_shorter_than_a_run_tell_nothing() -> None:
    short_NT = stream(80).view(8, -1)
    assert warning(short_NT, short_NT) is None


def test_the_builtin_halves_are_apart() -> None:
    halves = []
    for part in ("calibration", "evaluation"):
        words = load_text("builtin", part).joined.split()
        ids = torch.tensor([zlib.crc32(word.encode()) % 49152 for word in words])
        halves.append(ids[: len(ids) // 1024 * 1024].view(-1, 1024))
    assert warning(*halves) is None
