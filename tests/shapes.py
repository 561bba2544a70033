"""Checks the shapes that annotations state, at every call of the tests that ask for it.

Checking takes a quarter of the time of a test of small tensors; the contract tests call every
method, and so all that states shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import config, install_import_hook

SOURCE = Path(__file__).parents[1] / "src"


def install() -> None:
    """Has the modules of ours that state shapes checked where `enable` says so.

    Call it before they are imported.
    """
    modules = [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in sorted(SOURCE.rglob("*.py"))
        if "from jaxtyping" in path.read_text("utf-8")
    ]
    assert modules
    install_import_hook(modules, f"{__name__}.check")
    enable(False)


def enable(checked: bool) -> None:
    """Whether calls are checked from now on."""
    config.update("jaxtyping_disable", not checked)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, where an annotation is a shape; it knows no `Self` outside of a class."""
    shaped = any("Tensor, " in str(hint) for hint in function.__annotations__.values())
    return beartype(function) if shaped else function
