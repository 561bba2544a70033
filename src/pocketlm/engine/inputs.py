"""The rounding of inputs in a loaded block: what each group's linears round with, and from when.

It is decided for the whole block once, after folds and before anything is compressed: static scales
come from the least and the largest input in one run of the calibration text. A group's inputs are
rounded from the moment its weights are compressed, so that what follows is calibrated on what will
be executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer, static_quantizer
from pocketlm.core.errors import CalibrationError
from pocketlm.core.spec import ActivationSpec
from pocketlm.core.state import Note
from pocketlm.core.stats import Range
from pocketlm.core.views import BlockView, Group
from pocketlm.engine.batches import Batches

Take = Callable[[Tensor, Tensor | None], None]


class Inputs:
    """The quantizers of one block's linears.

    Args:
        block: The loaded block, after folds.
        activations: How inputs are rounded, by module path; others are read as they are.
        batches: The calibration data; None where no step needs any.
        device: Where statistics are gathered.
    """

    def __init__(
        self,
        block: BlockView,
        activations: Mapping[str, ActivationSpec],
        batches: Batches | None,
        device: torch.device,
    ) -> None:
        self._block = block
        self.notes: dict[str, Note] = {}
        self._of: dict[str, InputQuantizer] = {}
        static: list[Group] = []
        for group in block.groups:
            for name in group.linears:
                spec = activations.get(name)
                if spec is not None and spec.dynamic:
                    self._of[name] = InputQuantizer(spec)
            if any(name in activations and name not in self._of for name in group.linears):
                static.append(group)
        if static:
            assert batches is not None
            ranges = _ranges(block, static, batches, device)
            for group in static:
                found = ranges[group.index]
                if not found.tokens:
                    found = self._borrowed(group, static, ranges)
                for name in group.linears:
                    if name in activations:
                        spec = activations[name]
                        self._of[name] = static_quantizer(found.low, found.high, spec)

    def of(self, name: str) -> InputQuantizer | None:
        """What a linear rounds its inputs with."""
        return self._of.get(name)

    def set(self, name: str, *, on: bool) -> None:
        """Makes a linear round its inputs in the block's forward, or read them as they come."""
        self._block.linears[name].set_input_quantizer(self.of(name) if on else None)

    def set_all(self) -> None:
        """Makes every linear round its inputs whose are to be rounded."""
        for name in self._of:
            self.set(name, on=True)

    def rounded(self, take: Take, name: str) -> Take:
        """Hands a linear's inputs on rounded; those of the original model as they are."""
        quantizer = self.of(name)
        if quantizer is None:
            return take
        return lambda x_TI, original_TI: take(quantizer(x_TI), original_TI)

    def _borrowed(self, group: Group, groups: list[Group], ranges: dict[int, Range]) -> Range:
        """The range over all like groups, for an expert that no token reaches.

        Raises:
            CalibrationError: If no token reaches any of them.
        """
        like = [ranges[g.index] for g in groups if _leaves(g) == _leaves(group)]
        wide = Range(like[0].columns, like[0].device)
        for other in like:
            wide.merge(other)
        if not wide.tokens:
            raise CalibrationError(
                "no calibration token reaches it, so its inputs have no range.",
                where=group.linears[0],
                remedy="Give more calibration text, or a scheme with dynamic scales.",
            )
        text = "no calibration token reached it: its inputs are taken to range as its siblings'."
        for name in group.linears:
            self.notes[name] = Note("input_range", text)
        return wide


def _leaves(group: Group) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in group.linears)


def _ranges(
    block: BlockView, groups: list[Group], batches: Batches, device: torch.device
) -> dict[int, Range]:
    """The range of each group's inputs, in one run of every batch."""
    ranges = {g.index: Range(block.linears[g.linears[0]].in_features, device) for g in groups}
    for batch, call in enumerate(batches.calls):
        run = block.start(batches.store.get(batch).to(device), call)
        while (pause := run.advance()) is not None:
            if pause.group in ranges:
                ranges[pause.group].add(pause.inputs)
    return ranges
