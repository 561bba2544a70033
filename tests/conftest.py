"""What tests do without: exact rates of the machine, waiting for the disk, more processes.

Nothing heavy is imported before a test asks for it: the process that hands out tests loads no
torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests import shapes

shapes.install()


@pytest.fixture(autouse=True, scope="session")
def _quick_machine() -> Iterator[None]:
    """Rates from two calls each, not from 0.3 seconds of them: no test compares a plan's seconds.
    Files are not synced: a test that a crash of the machine interrupts proves nothing anyway.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketlm.engine.machine.MEASURE_SECONDS", 0.0)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def checked_shapes() -> Iterator[None]:
    """Shapes that annotations state are checked at every call."""
    shapes.enable(True)
    yield
    shapes.enable(False)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` runs plain transformers in this process: a new one imports it for 8 seconds.

    A process of its own is proved by test_main_job.py::test_verify_passes.
    """
    from pocketlm.evaluate import verify_logits
    from pocketlm.hf import plain_logits

    monkeypatch.setattr(
        verify_logits, "_logits_elsewhere", lambda path, tokens, _: plain_logits(path, tokens)
    )
