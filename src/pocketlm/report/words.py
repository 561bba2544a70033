"""Figures in words: bytes, seconds, counts, intervals; one spelling for page, card and terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its home imports numpy, which the first lines of a terminal need not wait for
    from pocketlm.evaluate.bootstrap import Interval

MISSING = "–"


def bytes_text(count: float | None) -> str:
    """Bytes in decimal units: ``86.3 MB``."""
    if count is None:
        return MISSING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            value = count / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float | None) -> str:
    """A duration: ``0.41 s``, ``38 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number_text(value: float | None, digits: int = 3) -> str:
    """A figure to some significant digits: ``1,234``, ``17.4``, ``0.00312``."""
    if value is None:
        return MISSING
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{float(text):f}".rstrip("0").rstrip(".") if "e" in text else text


def signed_text(value: float) -> str:
    """The same with its sign."""
    return f"{'+' if value >= 0 else '−'}{number_text(abs(value))}"


def percent_text(share: float, digits: int = 1) -> str:
    """A share: ``93.4 %``."""
    return f"{100 * share:.{digits}f} %"


def error_text(share: float) -> str:
    """A relative error, never rounded to nothing: ``10.76 %``, ``0.00312 %``."""
    return percent_text(share, 2) if share >= 1e-3 else f"{number_text(100 * share)} %"


def interval_text(interval: Interval, signed: bool = False) -> str:
    """The two ends: ``0.0201 to 0.0233``."""
    ends = (interval.low, interval.high)
    return " to ".join(signed_text(end) if signed else number_text(end) for end in ends)


def share_text(interval: Interval) -> str:
    """The two ends of a share: ``41.2 % to 45.0 %``."""
    return f"{percent_text(interval.low)} to {percent_text(interval.high)}"


def points_text(change: float) -> str:
    """A change of a share in percentage points: ``−1.2``."""
    return f"{'+' if change >= 0 else '−'}{abs(100 * change):.1f}"


def quantity_text(value: float | None, unit: str) -> str:
    """A figure in its unit: ``bytes``, ``seconds``, or one that is spelt after it."""
    if unit == "bytes":
        return bytes_text(value)
    if unit == "seconds":
        return seconds_text(value)
    return MISSING if value is None else f"{number_text(value)} {unit}"
