"""How much each grid changes what a linear gives: one streamed pass of the original model.

A unit's error is relative, summed over its linears:  Σ |(W - Q) X|² / Σ |W X|²,
with Q by the quick method and X the inputs of the original model. It costs a forward pass, and for
each linear and grid the quick method and a product with the Hessian.

Legend: B sequences, T tokens, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.errors import NumericError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stats import Hessian
from pocketlm.core.views import LinearView, ModelView
from pocketlm.search.quick import gathered, quantized
from pocketlm.search.units import Candidate

GridsOf = Mapping[str, Sequence[QuantSpec]]  # module path → grids


@dataclass(frozen=True)
class Energy:
    """Squared outputs of one linear, summed over tokens and rows; over weights where no token came.

    Attributes:
        lost: Of the difference that a grid makes.
        whole: Of the original.
        tokens: That reached the linear.
    """

    lost: float
    whole: float
    tokens: int


@torch.no_grad()
def measure_energies(
    model: ModelView,
    tokens_BT: Tensor,
    wanted: GridsOf,
    keep: Callable[[str, QuantSpec, Energy], None],
    on_block: Callable[[int], None],
) -> None:
    """Streams the original model once and measures what is asked for.

    Args:
        model: The original.
        tokens_BT: int64 ids of one batch.
        wanted: Module path → fitted grids.
        keep: Called with each finding.
        on_block: Called with the index of each block that is done.
    """
    hidden_BTD, call = model.begin(tokens_BT.to(model.device))
    owners = [
        [name for name in wanted if name.startswith(f"{path}.")] for path in model.block_paths
    ]
    last = max((index for index, names in enumerate(owners) if names), default=-1)
    for index in range(last + 1):
        with model.block(index) as block:
            run = block.start(hidden_BTD, call)
            unseen = set(owners[index])
            pause = run.advance()
            while pause is not None:
                names = [n for n in block.groups[pause.group].linears if n in unseen]
                hessian = gathered(pause.inputs, model.device) if names else None
                for name in names:
                    assert hessian is not None
                    _measure(block.linears[name], hessian, wanted[name], keep)
                unseen -= set(names)
                pause = run.advance()
            hidden_BTD = run.output
            for name in sorted(unseen):  # an expert that no token chose
                empty = Hessian(block.linears[name].in_features, model.device)
                _measure(block.linears[name], empty, wanted[name], keep)
        on_block(index)


def _measure(
    view: LinearView,
    hessian: Hessian,
    specs: Sequence[QuantSpec],
    keep: Callable[[str, QuantSpec, Energy], None],
) -> None:
    weight_OI = view.weight_OI()
    matrix_II = hessian.matrix_II() * (hessian.tokens / 2) if hessian.tokens else None
    whole = _energy(weight_OI, matrix_II)
    for spec in specs:
        lost = _energy(weight_OI - quantized(view, weight_OI, spec, hessian), matrix_II)
        if not math.isfinite(lost + whole):
            raise NumericError(
                "its output error is not finite.", where=view.name, remedy="Add it to --ignore."
            )
        keep(view.name, spec, Energy(lost, whole, hessian.tokens))


def _energy(weight_OI: Tensor, matrix_II: Tensor | None) -> float:
    """|W X|², or |W|² without X."""
    if matrix_II is None:
        return float(weight_OI.square().sum())
    return float(((weight_OI @ matrix_II) * weight_OI).sum())


def relative_error(
    candidate: Candidate, energy_of: Callable[[str, QuantSpec], Energy]
) -> tuple[float, bool]:
    """A unit's relative error on a candidate.

    Args:
        candidate: One of the unit's.
        energy_of: What was measured.

    Returns:
        The error, and whether any token reached the unit; if none did, the error is that of the
        bare weights.
    """
    energies = [energy_of(name, spec) for name, spec in candidate.specs.items()]
    reached = [energy for energy in energies if energy.tokens]
    counted = reached or energies
    whole = sum(energy.whole for energy in counted)
    lost = sum(energy.lost for energy in counted)
    return (lost / whole if whole > 0 else lost), bool(reached)
