"""Learning on a GPU gives the same artifact every time; run with ``pytest -m gpu tests/gpu``."""

import hashlib

import pytest
from tests.e2e.conftest import save_model

from pocketlm import api

pytestmark = pytest.mark.gpu


def test_it_repeats_itself(tmp_path):
    source = save_model(tmp_path / "model")
    recipe = {"steps": ["clip", {"method": "autoround", "options": {"iters": 20}}]}
    digests = []
    for name in ("one", "other"):
        made = api.compress(source, recipe, tmp_path / name, samples=32, seq_len=64, device="cuda")
        digests.append(hashlib.sha256((made.output / "model.safetensors").read_bytes()).digest())
        assert not any("any order" in note for note in made.warnings)
        assert "any order" not in (made.output / "pocketlm" / "ledger.json").read_text()
    assert digests[0] == digests[1]
