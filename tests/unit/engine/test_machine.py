"""What a machine cannot do is told before a run, and stays in what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketlm import prepare
from pocketlm.engine import machine
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.rtn import Rtn
from pocketlm.recipes import build_recipe

TROUBLE = "CalledProcessError: Command '['/usr/bin/gcc', '/tmp/tmp1234/main.c']' failed"


def test_missing_kernels_are_told_where_a_step_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(machine, "kernel_trouble", lambda: TROUBLE)
    note = machine.kernels_note(gpu, [Rtn(), Gptq()])
    assert note is not None
    assert "(CalledProcessError)" in note
    assert "tmp1234" not in note
    assert machine.kernels_note(gpu, [Rtn()]) is None
    assert machine.kernels_note(torch.device("cpu"), [Gptq()]) is None
    monkeypatch.setattr(machine, "kernel_trouble", lambda: None)
    assert machine.kernels_note(gpu, [Gptq()]) is None


def test_the_note_is_one_of_the_runs_warnings(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the plan shows, and the ledger and the report keep."""
    monkeypatch.setattr(prepare, "kernels_note", lambda device, steps: "no kernels here.")
    prepared = prepare.prepare(
        tiny, build_recipe(method="rtn", bits=4), tmp_path / "out", resume=False, device="cpu"
    )
    assert prepared.job.warnings == ("no kernels here.",)
    assert prepared.plan.warnings == ["no kernels here."]
