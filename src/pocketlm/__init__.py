"""pocketlm: give it a language model and a budget; get back the best model that fits, with proof.

The names below are imported on first use: `import pocketlm` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "bench",
    "bisect",
    "compare",
    "compress",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "roofline",
    "search",
    "verify",
]

if TYPE_CHECKING:
    from pocketlm.api import (
        bench,
        bisect,
        compare,
        compress,
        evaluate,
        export,
        generate,
        inspect,
        load,
        plan,
        roofline,
        search,
        verify,
    )


class _Package(ModuleType):
    """Lets a function of `__all__` stay where a folder of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        """Sets it, unless it is such a folder."""
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("pocketlm.api"), name)
    raise AttributeError(f"module 'pocketlm' has no attribute '{name}'")
