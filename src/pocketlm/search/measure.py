"""Measures what the sensitivity table needs and the store lacks, and tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import QuantSpec
from pocketlm.core.views import ModelView
from pocketlm.engine.events import EventLog
from pocketlm.search.divergence import Variant, Work, measure_divergences
from pocketlm.search.ends import measure_end_energies
from pocketlm.search.errors import Energy, measure_energies, relative_error
from pocketlm.search.store import Store
from pocketlm.search.table import Cell, choose_cells
from pocketlm.search.units import Unit


class Measurer:
    """One model and text, measured into a store.

    Args:
        model: The original.
        windows: One batch of text.
        store: Where findings are kept.
        log: Where events go.
    """

    def __init__(self, model: ModelView, windows: Windows, store: Store, log: EventLog) -> None:
        self._model, self._windows, self._store, self._log = model, windows, store, log
        self.notes: list[str] = []

    def errors(self, units: Sequence[Unit]) -> list[list[float]]:
        """The relative output error of every candidate, by unit."""
        wanted: dict[str, list[QuantSpec]] = {}
        for unit in units:
            if unit.end is not None:
                measure_end_energies(self._model, unit, self._store.energy, self._store.keep_energy)
                continue
            for candidate in unit.candidates:
                for name, spec in candidate.specs.items():
                    known = wanted.setdefault(name, [])
                    if self._store.energy(name, spec) is None and spec not in known:
                        known.append(spec)
        wanted = {name: specs for name, specs in wanted.items() if specs}
        if wanted:
            grids = sum(len(specs) for specs in wanted.values())
            text = f"sensitivity: output errors of {len(wanted)} linears, {grids} grids"
            self._log.emit("stage", text, data={"stage": "search"})
            clock, total = _Clock(self._log, "output errors"), len(self._model.block_paths)
            measure_energies(
                self._model, self._windows.tokens_NT, wanted, self._store.keep_energy,
                on_block=lambda index: clock.at(index + 1, total),
            )  # fmt: skip

        def energy_of(name: str, spec: QuantSpec) -> Energy:
            energy = self._store.energy(name, spec)
            assert energy is not None
            return energy

        table: list[list[float]] = []
        for unit in units:
            found = [relative_error(candidate, energy_of) for candidate in unit.candidates]
            table.append([error for error, _ in found])
            if unit.end is None and not all(reached for _, reached in found):
                text = f"no token reached {unit.name}: its error is that of the bare weights."
                self.notes.append(text)
        return table

    def damages(
        self, units: Sequence[Unit], errors: Sequence[Sequence[float]], limit_seconds: float
    ) -> dict[Cell, float]:
        """The KL of the cells that are measured, now or before.

        Args:
            units: What is free to choose.
            errors: Relative errors, by unit and candidate.
            limit_seconds: What measuring may take.
        """
        tokens = self._windows.tokens_NT.numel()
        work = Work(self._model, tokens)
        question = {
            "units": [unit.linears for unit in units],
            "grids": [[_plain(c.spec) for c in unit.candidates] for unit in units],
            "seconds": limit_seconds,
        }
        choice = self._store.choice(question)
        if choice is None:
            choice = choose_cells(units, errors, work.seconds, limit_seconds)
            self._store.keep_choice(question, choice)
        cells, note = choice
        self.notes += [] if note is None else [note]
        cell_of = {Variant(units[u], units[u].candidates[c]): (u, c) for u, c in cells}
        missing = [v for v in cell_of if self._store.divergence(v.candidate.specs) is None]
        if missing:
            takes = work.seconds(missing)
            text = (
                f"sensitivity: KL of {len(missing)} single changes on {tokens} tokens, "
                f"about {takes / 60:.0f} min"
            )
            self._log.emit("stage", text, data={"stage": "search", "seconds": takes})
            clock, total, done = _Clock(self._log, "KL"), sum(map(work.of, missing)), [0]

            def step(products: int) -> None:
                done[0] += products
                clock.at(done[0], total)

            def keep(variant: Variant, kl: float) -> None:
                self._store.keep_divergence(variant.candidate.specs, kl)

            measure_divergences(self._model, self._windows.tokens_NT, missing, keep, step)
        known: dict[Cell, float] = {}
        for variant, cell in cell_of.items():
            kl = self._store.divergence(variant.candidate.specs)
            assert kl is not None
            known[cell] = kl
        return known


def _plain(spec: QuantSpec | None) -> dict[str, Any] | None:
    return None if spec is None else spec.model_dump(mode="json")


class _Clock:
    """Tells how far a stage has come, in hundredths, and the time left."""

    def __init__(self, log: EventLog, text: str) -> None:
        self._log, self._text, self._shown = log, text, -1
        self._started = time.monotonic()

    def at(self, done: int, total: int) -> None:
        hundredth = 100 * done // total
        if hundredth == self._shown:
            return
        self._shown = hundredth
        elapsed = time.monotonic() - self._started
        self._log.emit(
            "progress", self._text, done=min(hundredth, 100), total=100,
            seconds_left=elapsed / done * (total - done), data={"stage": "search"},
        )  # fmt: skip
