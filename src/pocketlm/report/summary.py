"""The headline and the before/after table, as text that page, card and terminal share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pocketlm.evaluate.bootstrap import Interval
from pocketlm.report.data import ReportData
from pocketlm.report.words import (
    MISSING,
    bytes_text,
    interval_text,
    number_text,
    percent_text,
    signed_text,
)


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; a missing figure is a dash.

    Attributes:
        label: What is measured, and its unit.
        original: Before.
        compressed: After.
        change: From one to the other; empty where that says nothing.
        interval: The 95 % interval of the change, or of the figure; empty without one.
    """

    label: str
    original: str
    compressed: str
    change: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the few figures that stand first."""

    value: str
    label: str
    detail: str


def headline(data: ReportData) -> str:
    """The result in one sentence, figures only."""
    ratio = data.original_bytes / max(data.compressed_bytes, 1)
    parts = [
        f"{bytes_text(data.original_bytes)} became {bytes_text(data.compressed_bytes)}, "
        f"{number_text(ratio)}× smaller"
    ]
    divergence = data.quality.divergence if data.quality else None
    if data.quality and divergence:
        parts.append(
            f"perplexity went from {number_text(divergence.original_perplexity)} "
            f"to {number_text(data.quality.perplexity)}"
        )
        parts.append(
            f"{percent_text(divergence.top1_agreement.value)} of the next-token choices "
            "are the same"
        )
    elif data.quality:
        parts.append(f"perplexity is {number_text(data.quality.perplexity)}")
    else:
        parts.append("quality has not been measured yet")
    return "; ".join(parts) + "."


def tiles(data: ReportData) -> list[Tile]:
    """The figures that stand first, at most four."""
    ratio = data.original_bytes / max(data.compressed_bytes, 1)
    found = [
        Tile(
            f"{number_text(ratio)}×",
            "smaller on disk",
            f"{bytes_text(data.original_bytes)} → {bytes_text(data.compressed_bytes)}",
        )
    ]
    divergence = data.quality.divergence if data.quality else None
    if divergence:
        loss = divergence.loss_over_original
        found.append(
            Tile(
                signed_text(loss.value),
                "nats/token over the original",
                f"95 %: {interval_text(loss, signed=True)}",
            )
        )
        same = divergence.top1_agreement
        found.append(
            Tile(
                percent_text(same.value),
                "same top token",
                f"95 %: {_shares(same)}",
            )
        )
    if data.speed:
        now = data.speed.decode_tokens_per_second
        before = data.original_speed
        detail = "not measured for the original"
        if before:
            factor = now / before.decode_tokens_per_second
            detail = f"{number_text(factor)}× the original's speed"
        found.append(Tile(number_text(now), "tokens/s decoding", detail))
    return found


def before_after(data: ReportData) -> list[Row]:
    """The table: bytes, bits, perplexity, KL, agreement, speed, memory.

    Args:
        data: What was measured.

    Returns:
        Rows in reading order; what was not measured has dashes.
    """
    return [*size_rows(data), *quality_rows(data), *speed_rows(data)]


def size_rows(data: ReportData) -> list[Row]:
    """Bytes and bits, before and after."""
    bits = data.compressed_bytes * 8 / max(data.parameters, 1)
    return [
        _factor("Weights on disk", data.original_bytes, data.compressed_bytes, bytes_text),
        Row("Bits per weight, all", *_pair(data.original_bits, bits)),
        Row("Bits per weight, compressed linears", *_pair(data.original_bits, data.linear_bits)),
    ]


def quality_rows(data: ReportData) -> list[Row]:
    """Perplexity, KL and agreement."""
    quality = data.quality
    divergence = quality.divergence if quality else None
    if quality is None or divergence is None:
        value = quality.perplexity if quality else None
        return [Row("Perplexity", MISSING, number_text(value, 4))]
    loss = divergence.loss_over_original
    relative = quality.perplexity / divergence.original_perplexity - 1
    return [
        Row(
            "Perplexity",
            *_pair(divergence.original_perplexity, quality.perplexity, 4),
            f"{signed_text(100 * relative)} %",
        ),
        Row(
            "Log-perplexity, nats/token",
            *_pair(divergence.original_log_perplexity.value, quality.log_perplexity.value, 4),
            signed_text(loss.value),
            interval_text(loss, signed=True),
        ),
        Row(
            "KL to the original, mean nats",
            "0",
            number_text(divergence.kl_mean.value),
            interval=interval_text(divergence.kl_mean),
        ),
        Row(
            "KL: 99 % of tokens below, nats",
            "0",
            number_text(divergence.kl_p99.value),
            interval=interval_text(divergence.kl_p99),
        ),
        Row(
            "Same top token",
            "100 %",
            percent_text(divergence.top1_agreement.value),
            interval=_shares(divergence.top1_agreement),
        ),
    ]


def speed_rows(data: ReportData) -> list[Row]:
    """Tokens a second and memory."""
    before, after = data.original_speed, data.speed
    figures: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("Prefill, tokens/s", "prefill_tokens_per_second", number_text),
        ("Decode, tokens/s", "decode_tokens_per_second", number_text),
        ("Peak memory", "peak_memory_bytes", bytes_text),
    ]
    if any(report and report.peak_device_memory_bytes for report in (before, after)):
        figures.append(("Peak memory of the accelerator", "peak_device_memory_bytes", bytes_text))
    return [
        _factor(label, getattr(before, name, None), getattr(after, name, None), show)
        for label, name, show in figures
    ]


def _pair(original: float | None, compressed: float | None, digits: int = 3) -> tuple[str, str]:
    return number_text(original, digits), number_text(compressed, digits)


def _shares(interval: Interval) -> str:
    return f"{number_text(100 * interval.low)} to {percent_text(interval.high)}"


def _factor(
    label: str,
    original: float | None,
    compressed: float | None,
    show: Callable[[float | None], str] = number_text,
) -> Row:
    change = ""
    if original and compressed:
        change = f"× {number_text(compressed / original)}"
    return Row(label, show(original), show(compressed), change)
