"""What was measured, by its content: an interrupted search goes on, a later one starts from it.

A directory for each model, text, quick method and arithmetic; in it one line of JSON a finding:
    {"linear": path, "grid": {...}, "lost": …, "whole": …, "tokens": …}
    {"unit": [[path, {...}], …], "kl": …}
    {"choice": digest, "cells": [[unit, candidate], …], "note": … or null}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.core.spec import QuantSpec
from pocketlm.evaluate.cache import Lines, digest
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
        self._lines = Lines(root, context, "--search-dir")
        self.directory = self._lines.directory
        self._energies: dict[str, Energy] = {}
        self._divergences: dict[str, float] = {}
        self._choices: dict[str, Choice] = {}
        for found in self._lines.earlier:
            self._take(found)

    def _take(self, found: Mapping[str, Any]) -> None:
        if "linear" in found:
            key = _linear_key(found["linear"], found["grid"])
            self._energies[key] = Energy(found["lost"], found["whole"], found["tokens"])
        elif "unit" in found:
            self._divergences[digest(found["unit"])] = found["kl"]
        elif "choice" in found:
            cells = [(unit, candidate) for unit, candidate in found["cells"]]
            self._choices[found["choice"]] = (cells, found["note"])

    def energy(self, name: str, spec: QuantSpec) -> Energy | None:
        """What a grid does to a linear's output; None where it was not measured."""
        return self._energies.get(_linear_key(name, spec.model_dump(mode="json")))

    def keep_energy(self, name: str, spec: QuantSpec, energy: Energy) -> None:
        """Keeps what a grid does to a linear's output."""
        grid = spec.model_dump(mode="json")
        self._energies[_linear_key(name, grid)] = energy
        self._lines.append({"linear": name, "grid": grid, **vars(energy)})

    def divergence(self, specs: Mapping[str, QuantSpec]) -> float | None:
        """The KL of the model with these linears quantized; None where it was not measured."""
        return self._divergences.get(digest(_unit(specs)))

    def keep_divergence(self, specs: Mapping[str, QuantSpec], kl: float) -> None:
        """Keeps the KL of the model with these linears quantized."""
        self._divergences[digest(_unit(specs))] = kl
        self._lines.append({"unit": _unit(specs), "kl": kl})

    def choice(self, question: Any) -> Choice | None:
        """What an earlier search of the same question chose to measure."""
        return self._choices.get(digest(question))

    def keep_choice(self, question: Any, choice: Choice) -> None:
        """Keeps what is chosen to be measured: it depends on the machine's speed that day."""
        self._choices[digest(question)] = choice
        cells, note = choice
        self._lines.append({"choice": digest(question), "cells": cells, "note": note})


def _unit(specs: Mapping[str, QuantSpec]) -> list[list[Any]]:
    return [[name, spec.model_dump(mode="json")] for name, spec in specs.items()]


def _linear_key(name: str, grid: Mapping[str, Any]) -> str:
    return f"{name} {json.dumps(grid, sort_keys=True)}"
