"""What steps that make a smaller model have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import Strict
from pocketlm.core.stats import Stat
from pocketlm.core.transform import Structure


class Smaller(Strict):
    """A Transform (see core/transform.py): `measure` and `changes` are each step's own."""

    kind: ClassVar[Literal["transform"]] = "transform"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"shape"})

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read."""
        return True


class FewerBlocks(Smaller):
    """What steps that leave whole blocks out have in common.

    Attributes:
        ratio: Share of the blocks to remove, rounded to whole blocks.
        blocks: How many to remove, instead of a ratio.
    """

    ratio: float = Field(default=0.2, ge=0.0, lt=1.0)
    blocks: int | None = Field(default=None, ge=0)

    def count(self, total: int, free: int) -> int:
        """How many blocks go.

        Args:
            total: Blocks of the model.
            free: Of these, how many may go.

        Raises:
            ConfigError: If none would be left, or more would go than may.
        """
        count = round(self.ratio * total) if self.blocks is None else self.blocks
        if count >= total or count > free:
            raise ConfigError(
                f"{count} of {total} blocks would be removed, of {free} that may be.",
                where=type(self).__name__.lower(),
                remedy="Lower ratio or blocks: at least one block has to stay.",
            )
        return count


def by_block(structures: Iterable[Structure]) -> dict[int, list[Structure]]:
    """Structures by the index of the block that they are in."""
    found: dict[int, list[Structure]] = {}
    for structure in structures:
        found.setdefault(structure.block, []).append(structure)
    return found


def with_note(changes: Changes, note: str) -> Changes:
    """Changes with one more thing that the user is told."""
    return replace(changes, notes=(*changes.notes, note))
