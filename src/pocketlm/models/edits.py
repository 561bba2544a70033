"""Edits of all tensors of a checkpoint, from what is done to some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pocketlm.core.changes import Changes, Edit, Operation, Take
from pocketlm.core.transform import Structure
from pocketlm.models.adapter import Model


def parts_of(name: str) -> tuple[tuple[str, float], ...]:
    """A tensor alone."""
    return ((name, 1.0),)


def plain_tensor(model: Model, parameter: str) -> str | None:
    """The tensor of the checkpoint that is a parameter as it stands; None where none is."""
    binding = model.names.bindings.get(parameter)
    return binding.tensors[0] if binding is not None and binding.plain else None


def edits_of(
    model: Model, operations: Mapping[str, Sequence[Operation]], config: Mapping[str, Any]
) -> Changes:
    """All tensors, some with operations.

    Args:
        model: The original.
        operations: By tensor.
        config: Keys of the smaller model.
    """
    edits = []
    dropped = {name: "repeats a tied tensor" for name in model.repeated}
    for name in model.source.infos():
        if name not in dropped:
            made = tuple(operations.get(name, ()))
            edits.append(Edit(name, parts_of(name), made, "cut" if made else ""))
    return Changes(dict(config), tuple(edits), dropped)


def with_experts(
    model: Model,
    structures: Sequence[Structure],
    kept: Mapping[str, Sequence[Mapping[int, float]]],
    config: Mapping[str, Any],
) -> Changes:
    """All tensors, with other experts in some mixtures.

    Args:
        model: The original.
        structures: The mixtures.
        kept: Path of a mixture → its experts, as `Outline.keep_experts` takes them.
        config: Keys of the smaller model.
    """
    operations: dict[str, list[Operation]] = {}
    made: dict[str, Edit] = {}
    gone: set[str] = set()
    for structure in structures:
        mine = kept[structure.path]
        first = torch.tensor([next(iter(sources)) for sources in mine])
        for cut in structure.cuts:
            index = cut.index(first, structure.units)
            operations.setdefault(cut.tensor, []).append(Take(cut.axis, index))
        each = len(structure.readers) // structure.units
        parts = [structure.readers[i * each : (i + 1) * each] for i in range(structure.units)]
        for expert, linears in enumerate(parts):
            for place, linear in enumerate(linears):
                name = f"{linear}.weight"
                if expert >= len(mine):
                    gone.add(name)
                    continue
                sources = {f"{parts[i][place]}.weight": w for i, w in mine[expert].items()}
                account = "merged" if len(sources) > 1 else "cut"
                made[name] = Edit(name, tuple(sources.items()), (), account)
    whole = edits_of(model, operations, config)
    edits = tuple(made.get(e.name, e) for e in whole.edits if e.name not in gone)
    read = {edit.parts[0][0] for edit in edits}
    dropped = {n: "its expert is gone" for n in model.source.infos() if n not in read}
    one = structures[0]
    summary = f"{one.family} {one.units} → {len(next(iter(kept.values()), ()))}"
    return Changes(whole.config, edits, {**dropped, **whole.dropped}, summary)
