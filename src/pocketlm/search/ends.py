"""Embedding and head as something to choose for, where a budget is in bytes.

Each is a unit by itself, or one of both where they are tied, that may also keep its precision: an
average of bits is one of the linears inside blocks, and says nothing of them. Their error is that
of the bare weights; their damage is measured as any other, from the first block on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import QuantSpec, Recipe, matches
from pocketlm.core.tensors import Packed
from pocketlm.core.views import End, ModelView
from pocketlm.engine.ends import CHUNK_WEIGHTS, quantized_rows
from pocketlm.engine.grids import Grids, scale_dtype_for
from pocketlm.formats import format_for
from pocketlm.formats.capabilities import check_end
from pocketlm.formats.safetensors_header import element_bytes
from pocketlm.search.errors import Energy
from pocketlm.search.quick import quick_steps
from pocketlm.search.units import Candidate, Unit

HEADER_BYTES = 512  # of the lines of its further tensors in header and index, at most
HELD_WEIGHTS = 64 << 20  # codes of so many are kept while a variant is measured


def kept_bytes(model: ModelView, end: End, dtype: torch.dtype | None) -> int:
    """Bytes of an end that keeps its precision."""
    stored = model.source.infos()[end.tensor].dtype
    return end.shape[0] * end.shape[1] * element_bytes(dtype or stored)


def end_units(
    model: ModelView,
    recipe: Recipe,
    grids: Grids,
    candidates: Sequence[QuantSpec],
    target: str,
    dtype: torch.dtype | None,
) -> list[Unit]:
    """Embedding and head that are free to choose: neither ignored nor named by an override.

    Args:
        model: The source.
        recipe: What it names.
        grids: The recipe's grids as they would be without a search.
        candidates: Grids that may be chosen; those with zero points are taken without.
        target: Engine that must load the result.
        dtype: Of the tensors that are kept; None: as in the source.

    Returns:
        Units whose last candidate keeps the precision; none for an engine that loads nothing else.
    """
    if recipe.activations is not None:  # rounded inputs of other linears are stored otherwise there
        return []
    units: list[Unit] = []
    for end in model.ends():
        names = [name for name in (end.name, end.tied_name) if name is not None]
        ignored = any(matches(pattern, name) for pattern in recipe.ignore for name in names)
        if ignored or any(name in grids.ends for name in names):
            continue
        kept = Candidate(None, {}, bits=0, file_bytes=kept_bytes(model, end, dtype))
        cheaper = [
            candidate
            for candidate in _compressed(model, end, grids, candidates, target)
            if candidate.file_bytes < kept.file_bytes
        ]
        if cheaper:
            units.append(
                Unit(
                    name=end.name,
                    block=0 if end.embeds else len(model.block_paths),
                    linears=(end.name,),
                    weights=end.shape[0] * end.shape[1],
                    candidates=(*cheaper, kept),
                    end=end,
                )
            )
    return units


def _compressed(
    model: ModelView, end: End, grids: Grids, candidates: Sequence[QuantSpec], target: str
) -> list[Candidate]:
    form = "pocketlm" if end.embeds else grids.format_name
    scale = scale_dtype_for(model.source.infos()[end.tensor].dtype)
    found: dict[QuantSpec, Candidate] = {}
    for asked in candidates:
        spec = asked.model_copy(update={"symmetric": True})
        fitted = spec.fit(end.shape[1])
        try:
            check_end(form, fitted, end.shape, target, end.name, embeds=end.embeds)
        except UnsupportedLayer:
            continue
        stored = format_for(form).stored_bytes(fitted, end.shape, scale)
        candidate = Candidate(spec, {end.name: fitted}, bits=0, file_bytes=stored + HEADER_BYTES)
        found.setdefault(fitted, candidate)
    return sorted(found.values(), key=lambda candidate: candidate.file_bytes)


class EndRows:
    """The rows of an embedding or head on a grid, decoded: a `Rows` (see core/views.py).

    Args:
        model: The original.
        end: Which.
        spec: The grid, fitted.
    """

    def __init__(self, model: ModelView, end: End, spec: QuantSpec) -> None:
        self._model, self._end, self._spec = model, end, spec
        self._dtype = model.source.infos()[end.tensor].dtype
        self._held: dict[int, Packed] = {}
        self._step = max(1, CHUNK_WEIGHTS // end.shape[1])

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, float32 on the CPU."""
        first = start // self._step
        parts = [self._chunk(index) for index in range(first, -(-stop // self._step))]
        offset = first * self._step
        return torch.cat(parts)[start - offset : stop - offset]

    def _chunk(self, index: int) -> Tensor:
        if index in self._held:
            return self._held[index].dequantize()
        start = index * self._step
        stop = min(start + self._step, self._end.shape[0])
        rows = self._model.source.rows(self._end.tensor, start, stop).to(self._model.device).float()
        packed = quantized_rows(rows, self._end.name, self._spec, self._dtype, quick_steps())
        packed = packed.to("cpu")
        if self._end.shape[0] * self._end.shape[1] <= HELD_WEIGHTS:
            self._held[index] = packed
        return packed.dequantize()

    def energy(self) -> Energy:
        """Squared weights, and what of them the grid loses."""
        lost = whole = 0.0
        for start in range(0, self._end.shape[0], self._step):
            stop = min(start + self._step, self._end.shape[0])
            weight_OI = self._model.source.rows(self._end.tensor, start, stop).float()
            whole += float(weight_OI.square().sum())
            lost += float((weight_OI - self(start, stop)).square().sum())
        return Energy(lost, whole, 0)


def measure_end_energies(
    model: ModelView,
    unit: Unit,
    known: Callable[[str, QuantSpec], Energy | None],
    keep: Callable[[str, QuantSpec, Energy], None],
) -> None:
    """Measures what each grid does to the weights of an end, where that is not known yet."""
    assert unit.end is not None
    for candidate in unit.candidates:
        for name, spec in candidate.specs.items():
            if known(name, spec) is None:
                keep(name, spec, EndRows(model, unit.end, spec).energy())
