"""Peak memory as Linux counts it, of this process and of its children."""

import subprocess
import sys

import pytest

from pocketlm.evaluate import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEGABYTES_100 = "x = bytearray(100 << 20); print(1, flush=True); input()"


def test_the_peak_keeps_what_was_freed() -> None:
    before = memory.peak_memory_bytes()
    resident = memory._status_bytes(memory.os.getpid(), "VmRSS")
    assert before is not None
    assert resident is not None
    assert before >= resident
    block = b"x" * (before - resident + (64 << 20))
    del block
    after = memory.peak_memory_bytes()
    assert after is not None
    assert after >= before + (60 << 20)


def test_children_count() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", MEGABYTES_100], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        own, tree = memory.peak_memory_bytes(child.pid), memory.peak_memory_bytes()
        alone = memory._status_bytes(memory.os.getpid(), "VmHWM")
        child.communicate(b"\n")
    assert own is not None
    assert tree is not None
    assert alone is not None
    assert own >= 100 << 20
    assert tree >= alone + (100 << 20)
    assert memory.peak_memory_bytes(child.pid) is None  # it has ended
