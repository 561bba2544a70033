"""Programmatic dependent launch (Hopper): a kernel starts while the one before it still runs.

A kernel that was launched so must wait before it reads what others made or writes anything; what it
may read before are weights. Jitted.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait():
    """Waits for the kernel before this one to end, where it started early."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def release():
    """Lets the kernel behind this one start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
