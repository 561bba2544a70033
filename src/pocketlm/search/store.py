"""What was measured, by its content: an interrupted search goes on, a later one starts from it.

A directory for each model, text, quick method and arithmetic; in it one line of JSON a finding:
    {"linear": path, "grid": {...}, "lost": …, "whole": …, "tokens": …}
    {"unit": [[path, {...}], …], "kl": …}
    {"choice": digest, "cells": [[unit, candidate], …], "note": … or null}
A line cut off by a kill is passed over. Two searches at once find the same values and write both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.core.errors import ResourceError
from pocketlm.core.spec import QuantSpec
from pocketlm.formats.shards import write_file
from pocketlm.search.errors import Energy
from pocketlm.search.table import Choice


class Store:
    """The findings on one model, text and arithmetic.

    Args:
        root: Holds the directories of all of them.
        context: What every finding depends on, as plain JSON.

    Raises:
        ResourceError: If the directory cannot be written.
    """

    def __init__(self, root: Path, context: Mapping[str, Any]) -> None:
        self.directory = root / _digest(context)[:16]
        self._path = self.directory / "findings.jsonl"
        self._energies: dict[str, Energy] = {}
        self._divergences: dict[str, float] = {}
        self._choices: dict[str, Choice] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / "context.json").exists():
                text = json.dumps(context, indent=1, sort_keys=True)
                write_file(self.directory / "context.json", text.encode())
        except OSError as error:
            raise ResourceError(
                f"cannot be written ({error.strerror}).",
                where=str(self.directory),
                remedy="Give another place with --search-dir.",
            ) from error
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._take(line)
            if not text.endswith("\n"):
                self._write("\n")  # what comes next must not join a line that was cut off

    def _take(self, line: str) -> None:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # a kill cut it off
            return
        if "linear" in found:
            key = _linear_key(found["linear"], found["grid"])
            self._energies[key] = Energy(found["lost"], found["whole"], found["tokens"])
        elif "unit" in found:
            self._divergences[_digest(found["unit"])] = found["kl"]
        elif "choice" in found:
            cells = [(unit, candidate) for unit, candidate in found["cells"]]
            self._choices[found["choice"]] = (cells, found["note"])

    def _append(self, found: Mapping[str, Any]) -> None:
        self._write(json.dumps(found) + "\n")

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def energy(self, name: str, spec: QuantSpec) -> Energy | None:
        """What a grid does to a linear's output; None where it was not measured."""
        return self._energies.get(_linear_key(name, spec.model_dump(mode="json")))

    def keep_energy(self, name: str, spec: QuantSpec, energy: Energy) -> None:
        """Keeps what a grid does to a linear's output."""
        grid = spec.model_dump(mode="json")
        self._energies[_linear_key(name, grid)] = energy
        self._append({"linear": name, "grid": grid, **vars(energy)})

    def divergence(self, specs: Mapping[str, QuantSpec]) -> float | None:
        """The KL of the model with these linears quantized; None where it was not measured."""
        return self._divergences.get(_digest(_unit(specs)))

    def keep_divergence(self, specs: Mapping[str, QuantSpec], kl: float) -> None:
        """Keeps the KL of the model with these linears quantized."""
        self._divergences[_digest(_unit(specs))] = kl
        self._append({"unit": _unit(specs), "kl": kl})

    def choice(self, question: Any) -> Choice | None:
        """What an earlier search of the same question chose to measure."""
        return self._choices.get(_digest(question))

    def keep_choice(self, question: Any, choice: Choice) -> None:
        """Keeps what is chosen to be measured: it depends on the machine's speed that day."""
        self._choices[_digest(question)] = choice
        cells, note = choice
        self._append({"choice": _digest(question), "cells": cells, "note": note})


def _unit(specs: Mapping[str, QuantSpec]) -> list[list[Any]]:
    return [[name, spec.model_dump(mode="json")] for name, spec in specs.items()]


def _linear_key(name: str, grid: Mapping[str, Any]) -> str:
    return f"{name} {json.dumps(grid, sort_keys=True)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
