"""Sizes as people write them. How figures are spelt for people stands in `report/words.py`."""

from __future__ import annotations

import re

from pocketlm.core.errors import ConfigError

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str | None, flag: str) -> int | None:
    """Bytes from ``8GiB``, ``500MB`` or ``1000000``.

    Args:
        text: What the user wrote; None where the flag was not given.
        flag: The flag to name in an error.

    Returns:
        Bytes, or None.

    Raises:
        ConfigError: If it is no size.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{text}' is no size.", where=flag, remedy="Write it as 8GiB or 500MB.")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_BINARY | _POWERS)[unit])
