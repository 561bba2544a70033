"""What all steps that make a smaller model declare."""

from __future__ import annotations

from typing import ClassVar, Literal

from pocketlm.core.spec import Strict
from pocketlm.core.stats import Stat


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
