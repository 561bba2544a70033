"""How an error reaches the user: what, where and what to do on stderr, or one JSON object.

Errors of Python and PyTorch that a user can cure (memory, disk, permissions) are put into the typed
ones here; any other is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback

from pocketlm.cli.interrupt import EXIT_CODE
from pocketlm.core.errors import PocketLMError, ResourceError, SourceError

BUG = 1
LOWER = (
    "Lower --samples, --seq-len or --activation-budget, or close other programs; "
    "`pocketlm plan` says what each setting needs. The same command goes on from the last block."
)


def report(error: Exception, as_json: bool) -> int:
    """Shows an error.

    Args:
        error: What ended the command.
        as_json: Whether standard output gets ``{"error": {...}}``.

    Returns:
        The exit code.
    """
    typed = as_typed(error)
    if typed is None:
        traceback.print_exception(error, file=sys.stderr)
        what = f"{type(error).__name__}: {error}"
        remedy = "This is a bug in pocketlm: report it with the lines above and `pocketlm doctor`."
        _show("Bug", what, None, remedy, BUG, as_json)
        return BUG
    name = type(typed).__name__
    _show(name, typed.what, typed.where, typed.remedy, typed.exit_code, as_json)
    return typed.exit_code


def report_interrupt(verb: str | None, as_json: bool) -> int:
    """Says after Ctrl-C what is kept; returns the exit code."""
    remedy = None
    if verb == "compress":
        remedy = "Finished blocks are kept; run the same command to go on."
    elif verb in ("search", "bisect"):
        remedy = "What was measured is kept; run the same command to go on."
    _show("Interrupted", "stopped by Ctrl-C.", None, remedy, EXIT_CODE, as_json)
    return EXIT_CODE


def as_typed(error: Exception) -> PocketLMError | None:
    """The typed error that tells a user what this one means; None where it is a bug."""
    if isinstance(error, PocketLMError):
        return error
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return ResourceError("out of memory.", where=_first_line(error), remedy=LOWER)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "the disk is full.",
            where=_place(error),
            remedy="Free space, or put --output and --work-dir on another disk; "
            "the same command goes on from the last block.",
        )
    if isinstance(error, OSError) and error.filename is not None:
        remedy = "Check that the path exists and that you may read and write it."
        return SourceError(f"{error.strerror}.", where=_place(error), remedy=remedy)
    return None


def _is_torch_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported: then nothing of it can have failed
    if torch is None or not isinstance(error, RuntimeError):
        return False
    # The CPU allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: Exception) -> str | None:
    lines = str(error).splitlines()
    return lines[0] if lines else None


def _place(error: OSError) -> str | None:
    return None if error.filename is None else str(error.filename)


def _show(
    kind: str, what: str, where: str | None, remedy: str | None, code: int, as_json: bool
) -> None:
    if as_json:
        error = {"type": kind, "what": what, "where": where, "remedy": remedy, "exit_code": code}
        print(json.dumps({"error": error}, indent=2, ensure_ascii=False))
        return
    place = "" if where is None else f"{where}: "
    print(f"error: {place}{what}", file=sys.stderr)
    if remedy is not None:
        print(f"  → {remedy}", file=sys.stderr)
