"""Typed errors: what happened, where (a module path, file or flag), and what to do about it.

The CLI prints the three parts and leaves with `exit_code`; nobody else catches these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PocketLMError(Exception):
    """Base of every error that a user can cause or cure.

    Args:
        what: What happened, one sentence.
        where: The place: a module path, a file, a flag.
        remedy: What to do, one sentence in the imperative.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        parts = [what if where is None else f"{where}: {what}"]
        if remedy:
            parts.append(remedy)
        super().__init__(" ".join(parts))


class ConfigError(PocketLMError):
    """A flag, recipe or option is unknown, malformed or contradicts another."""


class EngineMissing(ConfigError):
    """A foreign engine or builder is not installed where it was looked for."""


class SourceError(PocketLMError):
    """The model cannot be read: missing, truncated, corrupt, or not finite."""


class UnsupportedModel(PocketLMError):
    """The model can be read, but not compressed: not a causal LM, unknown architecture."""


class UnsupportedLayer(PocketLMError):
    """One layer does not allow what the recipe asks of it."""


class SecurityError(PocketLMError):
    """Reading the model would run foreign code: pickle, remote code."""


class CalibrationError(PocketLMError):
    """The calibration or evaluation text is missing, empty or too short."""


class BudgetError(PocketLMError):
    """The budget is below what is possible, or the machine lacks the memory or disk."""


class ResourceError(PocketLMError):
    """Memory or disk ran out during the work."""

    exit_code = 3


class NumericError(PocketLMError):
    """A matrix stayed singular, or a value not finite, on every rung of the ladder."""

    exit_code = 3


class ArtifactError(PocketLMError):
    """A written artifact is incomplete, tampered with, or breaks the target engine's rules."""


class OutputBusy(PocketLMError):
    """The output exists already, or another run holds it."""


class ResumeError(PocketLMError):
    """The work directory belongs to another recipe, source, device or version."""


class GateFailed(PocketLMError):
    """A figure's whole interval breaks the bound that it was to keep."""

    exit_code = 4


class GateUndecided(PocketLMError):
    """A bound lies inside the interval of its figure: more windows or items would decide."""

    exit_code = 5


MOST_NAMES = 40  # that an error lists


def nearest(word: str, known: Iterable[str]) -> str:
    """Ends an error message with the nearest known word, or with all of them, if not too many.

    Args:
        word: What the user wrote.
        known: What would have been accepted.

    Returns:
        A sentence such as ``Did you mean 'gptq'?``.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{next(n for n in names if n.lower() == close[0])}'?"
    shown = names if len(names) <= MOST_NAMES + 1 else names[:MOST_NAMES]  # "1 more" is no shorter
    rest = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"Known: {', '.join(shown)}{rest}."
