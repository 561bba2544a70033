"""Which form transformers' classes can hold, and that what is written for them loads there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pocketlm
from pocketlm.models import open_model

REFUSED = {
    "falcon-new": "FalconLinear",
    "gpt-bigcode": "GPTBigCode",
    "llama4": "Llama4TextExperts",
    "gpt2": "transposed",
}


@pytest.mark.parametrize("family", ["llama", "phimoe", "mixtral", *REFUSED])
def test_a_class_that_cannot_hold_packed_linears(family: str, saved: Callable[..., Path]) -> None:
    refusal = open_model(saved(family)).packing_refusal("transformers")
    if family in REFUSED:
        assert refusal is not None
        assert REFUSED[family] in refusal
    else:
        assert refusal is None


def test_other_engines_have_classes_of_their_own(saved: Callable[..., Path]) -> None:
    assert open_model(saved("falcon-new")).packing_refusal("vllm") is None
    assert open_model(saved("gpt2")).packing_refusal("vllm") is not None


@pytest.mark.parametrize("family", ["phimoe", "falcon-new", "gpt-bigcode", "llama4"])
def test_what_is_written_loads(family: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"steps": ["rtn"], "weights": {"bits": 4, "group_size": 16}}
    result = pocketlm.compress(saved(family), recipe, tmp_path / "out")
    own = family in REFUSED
    assert result.plan.format == ("pocketlm" if own else "compressed-tensors")
    said = [w for w in result.warnings if "written in the format pocketlm" in w]
    assert len(said) == own
    report = pocketlm.verify(tmp_path / "out")
    assert [c for c in report.checks if c.status == "failed"] == []
