"""Calibration on text that the model writes itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from pocketlm.runtime import own_text

SELF = ("--calibration", "self", "--samples", "3", "--seq-len", "24", "--group-size", "32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def account(path):
    return json.loads((path / "pocketlm" / "ledger.json").read_text())["calibration"]


def test_the_model_writes_its_text_once(cli, source, tmp_path, monkeypatch, cache):
    done = cli("compress", source, "-o", tmp_path / "a", "--seed", "3", *SELF)
    assert done.code == 0, done.err
    first = account(tmp_path / "a")
    assert first["text_name"] == "text written by the model itself"
    assert (first["samples"], first["seq_len"], first["seed"]) == (3, 24, 3)
    assert first["health"]["different_tokens"] > 24
    monkeypatch.setattr(own_text, "load", None)  # the second run must not need the model
    assert cli("compress", source, "-o", tmp_path / "b", "--seed", "3", *SELF).code == 0
    assert account(tmp_path / "b") == first
    for file in cache.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])  # cut off: written anew, and the same
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert cli("compress", source, "-o", tmp_path / "c", "--seed", "3", *SELF).code == 0
    assert account(tmp_path / "c") == first
    assert cli("compress", source, "-o", tmp_path / "d", "--seed", "4", *SELF).code == 0
    assert account(tmp_path / "d")["windows_sha256"] != first["windows_sha256"]


def test_a_plan_writes_no_text(cli, source, cache):
    done = cli("plan", source, "--json", *SELF)
    assert done.code == 0
    assert "writes its calibration text first" in done.json["warnings"][0]
    assert not list(cache.rglob("*.npy"))


def test_a_search_measures_on_it_too(cli, source, cache):
    done = cli("search", source, "--bits", "5.0", "--calibration", "self", "--json")
    assert done.code == 0, done.err
    assert "written by the model itself" in done.json["calibration"]


def test_a_model_that_does_not_fit(cli, source, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "available_ram_bytes", lambda: 1000)
    done = cli("compress", source, "-o", tmp_path / "out", *SELF)
    assert done.code == 3
    assert "needs the whole model in memory" in done.err
    assert not (tmp_path / "out").exists()


def test_a_text_that_ends_is_followed_by_another():
    """A model that counts up, ends with 4, and would say 5 after it."""

    def counting(tokens_B1, **_):
        logits = torch.full((len(tokens_B1), 1, 10), -1e9)
        logits[torch.arange(len(tokens_B1)), 0, tokens_B1[:, 0] + 1] = 0.0
        return SimpleNamespace(logits=logits, past_key_values=None)

    counting.device = torch.device("cpu")
    written = own_text._tokens(
        counting, 10, torch.tensor([2]), frozenset([4]), 2, torch.Generator().manual_seed(0)
    )
    rows = torch.stack([next(written) for _ in range(7)], 1)
    assert rows.tolist() == [[2, 3, 4, 2, 3, 4, 2]] * 2
