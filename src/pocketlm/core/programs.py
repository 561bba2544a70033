"""Where a program is that a user named."""

from __future__ import annotations

import shutil
from pathlib import Path


def find_program(asked: str | Path) -> str | None:
    """The file itself where there is one, else what the shell would run; None where neither is.

    Args:
        asked: A path, or a name. A path loses its leading ``./`` as a `Path`, so that files come
            first.
    """
    place = Path(asked)
    return shutil.which(str(place.absolute()) if place.is_file() else str(asked))
