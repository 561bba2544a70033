"""Narrows a model: the least heads and FFN channels of every block go, equally many of each.

Every measure of importance is a subclass that gives a score for each unit of a structure (see
prune/importance). Widths stay uniform, so that a plain configuration can say them. A value head
goes with its query heads; heads lose no more than the ratio, channels make up for the rest of it.

Legend: O output rows, I input columns, U units, L blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.stats import Stat
from pocketlm.core.transform import CHANNELS, HEADS, Findings, Outline, Structure, Survey, Visit
from pocketlm.core.views import LinearView
from pocketlm.prune.smaller import Smaller, by_block, with_note

Dimension = Literal["channels", "heads"]
S = TypeVar("S", bound=Stat)


class Width(Smaller):
    """What all kinds of width pruning share.

    Attributes:
        ratio: Share of the blocks' weights to remove.
        dimensions: What may be cut: "channels" (FFN), "heads" (with grouped key and value heads).
        multiple_of: The number of channels left is a multiple of this.
        channels: How many channels to keep, instead of what the ratio leaves.
        heads: How many key and value heads to keep, instead of what the ratio leaves.
    """

    ratio: float = Field(default=0.2, ge=0.0, lt=1.0)
    dimensions: tuple[Dimension, ...] = Field(default=(CHANNELS, HEADS), min_length=1)
    multiple_of: int = Field(default=64, ge=1)
    channels: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)

    @abstractmethod
    def measure(self, survey: Survey) -> Findings:
        """A score for each unit, block by block."""

    def _structures(self, outline: Outline) -> dict[int, list[Structure]]:
        return by_block(one for name in self.dimensions for one in outline.structures(name))

    def biases(
        self, readers: Sequence[str], findings: Findings | None
    ) -> Mapping[str, Tensor | None]:
        """What is added to the outputs of linears that lose inputs.

        Args:
            readers: Their module paths.
            findings: Of `measure`; None: only which will get something is asked.
        """
        return {}

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The narrower model.

        Raises:
            ConfigError: If a dimension would lose every unit.
            UnsupportedLayer: If no engine can load the sizes.
        """
        sizes = self.sizes(outline)
        kept: dict[str, dict[str, Tensor]] = {}
        narrower: list[str] = []
        for block, structures in self._structures(outline).items():
            for one in structures:
                if sizes[one.family] < one.units:
                    narrower += one.readers
                scores_U = torch.zeros(one.units)
                if findings is not None:
                    scores_U = findings[block][f"{one.path}.{one.dimension}"]
                kept.setdefault(one.dimension, {})[one.path] = _best(scores_U, sizes[one.family])
        changes = outline.cut(kept, self.biases(narrower, findings))
        unreached = [n for one in findings or () for n in one if n.endswith(".unreached")]
        if not unreached:
            return changes
        note = (
            f"no calibration token reached {len(unreached)} experts, such as "
            f"{unreached[0].removesuffix('.unreached')}: their channels went by weight alone."
        )
        return with_note(changes, note)

    def sizes(self, outline: Outline) -> dict[str, int]:
        """Family → how many units each of its structures keeps.

        Raises:
            ConfigError: If a dimension would lose every unit.
        """
        structures = [s for group in self._structures(outline).values() for s in group]
        weights: dict[tuple[str, str], int] = {}
        units: dict[str, int] = {}
        for one in structures:
            key = (one.dimension, one.family)
            weights[key] = weights.get(key, 0) + one.units * outline.parameters(one)
            units[one.family] = one.units
        left = self.ratio * outline.block_weights()
        sizes: dict[str, int] = {}
        for dimension, family in weights:
            if dimension == HEADS:
                sizes[family] = self._heads(outline, family, units[family])
                left -= weights[dimension, family] * (1 - sizes[family] / units[family])
        total = sum(w for (dimension, _), w in weights.items() if dimension == CHANNELS)
        share = max(0.0, left / total) if total else 0.0
        for dimension, family in weights:
            if dimension == CHANNELS:
                sizes[family] = self._channels(units[family], share)
        return sizes

    def _heads(self, outline: Outline, family: str, units: int) -> int:
        """The least loadable number that is no less than its share."""
        if self.heads is not None:
            if self.heads > units:
                raise ConfigError(f"there are only {units} heads.", where="heads")
            return self.heads
        least = max(1, math.ceil((1 - self.ratio) * units - 1e-9))
        for count in range(least, units):
            if outline.loadable(HEADS, count, family) is None:
                return count
        return units

    def _channels(self, units: int, share: float) -> int:
        if self.channels is not None:
            if self.channels > units:
                raise ConfigError(f"there are only {units} channels.", where="channels")
            return self.channels
        if not share:
            return units
        wanted = round(units * (1 - share) / self.multiple_of) * self.multiple_of
        if wanted <= 0:
            raise ConfigError(
                f"no multiple of {self.multiple_of} channels of {units} would be left.",
                where="ratio",
                remedy="Lower ratio or multiple_of, or prune more dimensions.",
            )
        return min(wanted, units)


class InputWidth(Width):
    """Width pruning by statistics of what flows into the readers of each structure."""

    @abstractmethod
    def scores(self, structure: Structure, reader: LinearView, stat: Any) -> Tensor:
        """How much each unit matters [U], from what the reader's inputs were.

        Args:
            structure: The units.
            reader: The linear that reads them.
            stat: Of its inputs, gathered by `statistic`.
        """

    @abstractmethod
    def statistic(self, width: int, columns: int, device: torch.device) -> Stat:
        """An empty statistic of a reader's inputs; `width` columns belong to a unit."""

    def measure(self, survey: Survey) -> Findings:
        """A score for each unit, block by block."""
        of_block = self._structures(survey.outline)
        sizes = self.sizes(survey.outline)
        return survey.visit(lambda visit: self._look(visit, of_block.get(visit.index, ()), sizes))

    def _look(
        self, visit: Visit, structures: Sequence[Structure], sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Gathers what flows into the readers of a block, then scores."""
        stats = gather(visit, structures, self.statistic)
        found: dict[str, Tensor] = {}
        for structure in structures:
            total_U = torch.zeros(structure.units, dtype=torch.float64)
            for name in structure.readers:
                reader, stat = visit.block.linears[name], stats[name]
                score_U = self.scores(structure, reader, stat) if stat.tokens else None
                if score_U is None:  # an expert that no token reached: by its weights alone
                    score_U = per_unit(reader.weight_OI().square().sum(0), structure, reader)
                    found[f"{structure.path}.unreached"] = torch.ones(())
                total_U += score_U.double().cpu()
            found[f"{structure.path}.{structure.dimension}"] = total_U
            kept_U = _best(total_U, sizes[structure.family])
            found.update(self.extra(structure, kept_U, visit, stats))
        return found

    def extra(
        self, structure: Structure, kept_U: Tensor, visit: Visit, stats: Mapping[str, Stat]
    ) -> dict[str, Tensor]:
        """What else is to be kept of a structure, once it is known what is left of it."""
        return {}


def gather(
    visit: Visit,
    structures: Sequence[Structure],
    make: Callable[[int, int, torch.device], S],
) -> dict[str, S]:
    """Statistics of what flows into the readers of some structures of a block, by module path.

    Args:
        visit: The block, not run yet.
        structures: Of that block.
        make: An empty statistic, from the columns of a unit, all columns, and the device.
    """
    group_of = {name: group.index for group in visit.block.groups for name in group.linears}
    stats: dict[str, S] = {}
    at_group: dict[int, list[S]] = {}
    device = next(iter(visit.block.linears.values())).weight_OI().device
    for structure in structures:
        for name in structure.readers:
            cut = structure.cut_of(visit.block.linears[name].tensor_name)
            columns = visit.block.linears[name].in_features
            stats[name] = make(cut.width, columns, device)
            at_group.setdefault(group_of[name], []).append(stats[name])

    def take(group: int, x_TI: Tensor) -> None:
        for stat in at_group.get(group, ()):
            stat.add(x_TI)

    for _ in visit.run(take):
        pass
    return stats


def _best(scores_U: Tensor, count: int) -> Tensor:
    """The units with the highest scores, ascending; of equal ones the first."""
    order_U = torch.sort(scores_U, descending=True, stable=True).indices
    return order_U[:count].sort().values


def per_unit(value_I: Tensor, structure: Structure, reader: LinearView) -> Tensor:
    """Sums over the columns of each unit [U]."""
    cut = structure.cut_of(reader.tensor_name)
    return value_I.reshape(cut.copies, structure.units, cut.width).sum((0, 2))
