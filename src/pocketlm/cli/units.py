"""Numbers as people read them, and sizes as people write them."""

from __future__ import annotations

import re

from pocketlm.core.errors import ConfigError

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def show_bytes(count: float) -> str:
    """Bytes in binary units: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def show_seconds(seconds: float) -> str:
    """A duration: ``850 ms``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def show_count(count: int) -> str:
    """A large count: ``134.5 M``."""
    for power, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return str(count)


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
