"""The API replaced by one that notes how it was called."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from pocketlm.cli.main import run


class Stub(types.ModuleType):
    """Stands for pocketlm.api: answers by name, or raises what it is told to."""

    def __init__(self) -> None:
        super().__init__("pocketlm.api")
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls[name] = (args, options)
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Stub:
    import pocketlm

    stub = Stub()
    monkeypatch.setitem(sys.modules, "pocketlm.api", stub)
    monkeypatch.setattr(pocketlm, "api", stub, raising=False)
    return stub


@pytest.fixture
def cli() -> Callable[..., int]:
    return lambda *arguments: run([str(argument) for argument in arguments])
