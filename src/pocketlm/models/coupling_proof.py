"""Proof of a coupling: a model without some units computes what the model with zeros there does.

Both are opened as views of the original in float64; one block of each kind is run in both on the
same input. Legend: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.changes import Changes, Edit, Take, Zero
from pocketlm.core.errors import PocketLMError, UnsupportedLayer
from pocketlm.core.transform import Structure
from pocketlm.models.adapter import Model

TOKENS = 16
TOLERANCE = 1e-6  # relative; norms and rotary tables compute in float32 even in a float64 model

Describe = Callable[[Mapping[str, Any], Mapping[str, Any]], Changes]


def prove(
    model: Model,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    config: Mapping[str, Any],
    describe: Describe,
) -> None:
    """Compares cutting with zeroing.

    Args:
        model: The original.
        structures: Of one key of the configuration.
        kept: Path of each → units that stay.
        config: Keys of the smaller model.
        describe: Gives changes for operations by tensor, and a configuration.

    Raises:
        UnsupportedLayer: Naming the structure, if the outputs differ or the model cannot be opened.
    """
    from pocketlm.models.opening import reopen

    cuts: dict[str, list[Any]] = {}
    zeros: dict[str, list[Any]] = {}
    for structure in structures:
        units_U = kept[structure.path]
        gone_U = torch.tensor(sorted(set(range(structure.units)) - set(units_U.tolist())))
        for cut in structure.cuts:
            index, rest = cut.index(units_U, structure.units), cut.index(gone_U, structure.units)
            cuts.setdefault(cut.tensor, []).append(Take(cut.axis, index))
            zeros.setdefault(cut.tensor, []).append(Zero(cut.axis, rest))
    try:
        smaller = reopen(model, describe(cuts, config), dtype=torch.float64)
        zeroed = reopen(model, describe(zeros, {}), dtype=torch.float64)
    except PocketLMError as error:
        raise UnsupportedLayer(
            f"the smaller model cannot be opened: {error.what}", where=structures[0].path
        ) from error
    touched = {structure.block: structure.path for structure in structures}
    for alike in model.alike_blocks():
        index = next((i for i in alike if i in touched), None)
        if index is None:
            continue
        expected_BTD, found_BTD = (_run(view, index) for view in (zeroed, smaller))
        difference = float((found_BTD - expected_BTD).norm() / expected_BTD.norm())
        if not difference < TOLERANCE:
            raise UnsupportedLayer(
                "cutting its units is not the same as zeroing them (relative difference "
                f"{difference:.1e}): the coupling cannot be proved.",
                where=touched[index],
                remedy="Prune another dimension.",
            )


def prove_same(model: Model, structures: Sequence[Structure], reordered: Changes) -> None:
    """Compares a model with one whose experts were put in another order.

    Args:
        model: The original.
        structures: Its mixtures.
        reordered: The other one.

    Raises:
        UnsupportedLayer: Naming a mixture whose output differs.
    """
    from pocketlm.models.opening import reopen

    names = [name for name in model.source.infos() if name not in model.repeated]
    same = Changes({}, tuple(Edit(name, ((name, 1.0),)) for name in names), {})
    plain = reopen(model, same, dtype=torch.float64)
    other = reopen(model, reordered, dtype=torch.float64)
    touched = {structure.block: structure.path for structure in structures}
    for alike in model.alike_blocks():
        index = next((i for i in alike if i in touched), None)
        if index is None:
            continue
        expected_BTD, found_BTD = (_run(view, index) for view in (plain, other))
        difference = float((found_BTD - expected_BTD).norm() / expected_BTD.norm())
        if not difference < TOLERANCE:
            raise UnsupportedLayer(
                "its experts in another order give something else (relative difference "
                f"{difference:.1e}): the coupling cannot be proved.",
                where=touched[index],
            )


def _run(model: Model, index: int) -> Tensor:
    """What a block gives for a random input, the same for both models."""
    tokens_BT = torch.arange(TOKENS, device=model.device).remainder(model.vocabulary)[None]
    hidden_BTD, call = model.begin(tokens_BT)
    generator = torch.Generator().manual_seed(index)
    noise_BTD = torch.randn(hidden_BTD.shape, generator=generator, dtype=torch.float64)
    with model.block(index) as block:
        return block.forward(noise_BTD.to(hidden_BTD), call) - noise_BTD.to(hidden_BTD)
