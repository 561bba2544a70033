"""An answer on standard output: drawn with rich, or as JSON. Logs and progress go to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pocketlm.core.errors import PocketLMError


@dataclass(frozen=True)
class Answer:
    """What a verb has to say.

    Attributes:
        value: The typed result; all of it becomes the JSON.
        draw: Shows it to a person.
        failure: Set where the verb did its work and the result is bad news.
    """

    value: Any
    draw: Callable[[Console], None]
    failure: PocketLMError | None = None


def emit(answer: Answer, as_json: bool) -> int:
    """Prints an answer.

    Args:
        answer: What a verb returned.
        as_json: Whether to print JSON.

    Returns:
        The exit code.
    """
    if as_json:
        from pydantic_core import to_jsonable_python

        plain = to_jsonable_python(answer.value)
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        answer.draw(stdout())
    if answer.failure is None:
        return 0
    if not as_json:
        print(f"error: {answer.failure}", file=sys.stderr)
    return answer.failure.exit_code


def stdout() -> Console:
    """A console for answers; as wide as a log needs where no terminal gives a width."""
    return _console(sys.stdout)


def stderr() -> Console:
    """A console for progress and warnings."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    width = None if stream.isatty() else 120
    return Console(file=stream, width=width, highlight=False, emoji=False)
