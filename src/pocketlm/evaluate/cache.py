"""What was measured, by its content: an interrupted run goes on, a later one starts from it.

A directory for each context (model, text or items, arithmetic); in it one line of JSON a finding.
Two runs at once find the same values and write both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.core.errors import ResourceError
from pocketlm.formats.shards import write_file

LEDGER = Path("pocketlm") / "ledger.json"


class Lines:
    """What was found in one context, a line of JSON each; a line cut off by a kill is passed over.

    Args:
        root: Holds the directories of all contexts.
        context: What every finding depends on, as plain JSON.
        flag: What names another place, for messages.

    Attributes:
        directory: Of this context.
        earlier: What was found before.

    Raises:
        ResourceError: If the directory cannot be written.
    """

    def __init__(self, root: Path, context: Mapping[str, Any], flag: str) -> None:
        self.directory = root / digest(context)[:16]
        self._path = self.directory / "findings.jsonl"
        self.earlier: list[dict[str, Any]] = []
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / "context.json").exists():
                text = json.dumps(context, indent=1, sort_keys=True)
                write_file(self.directory / "context.json", text.encode())
        except OSError as error:
            raise ResourceError(
                f"cannot be written ({error.strerror}).",
                where=str(self.directory),
                remedy=f"Give another place with {flag}.",
            ) from error
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._take(line)
            if not text.endswith("\n"):
                self._write("\n")  # what comes next must not join a line that was cut off

    def _take(self, line: str) -> None:
        try:
            self.earlier.append(json.loads(line))
        except json.JSONDecodeError:  # a kill cut it off
            return

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def append(self, found: Mapping[str, Any]) -> None:
        """Keeps a finding, at once."""
        self._write(json.dumps(found) + "\n")


class Findings:
    """Values by key, of one context; a line is ``{"key": digest, "value": …}``.

    Args:
        root: As of `Lines`.
        context: As of `Lines`.

    Raises:
        ResourceError: If the directory cannot be written.
    """

    def __init__(self, root: Path, context: Mapping[str, Any]) -> None:
        self._lines = Lines(root, context, "--cache-dir")
        self.directory = self._lines.directory
        self._known = {found["key"]: found["value"] for found in self._lines.earlier}

    def get(self, key: Any) -> Any | None:
        """The value of a key, plain JSON; None where it was not found yet."""
        return self._known.get(digest(key))

    def keep(self, key: Any, value: Any) -> None:
        """Keeps the value of a key, at once."""
        self._known[digest(key)] = value
        self._lines.append({"key": digest(key), "value": value})


def digest(value: Any) -> str:
    """SHA-256 of plain JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_of(path: str | Path, fingerprint: str) -> str:
    """What a model's figures depend on: its fingerprint and, of an artifact, its ledger's hashes.

    Args:
        path: As the user named it.
        fingerprint: Of its tensors, from `TensorSource.fingerprint`.
    """
    ledger = Path(path) / LEDGER
    account = ledger.read_bytes() if ledger.is_file() else b""
    return hashlib.sha256(fingerprint.encode() + account).hexdigest()
