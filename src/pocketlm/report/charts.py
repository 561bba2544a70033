"""Charts as inline SVG that stretches to any width; every word and figure beside it is HTML.

Text inside a scaled drawing shrinks with the page, so none is drawn: labels are table cells, and
each bar carries a <title> for pointer and screen reader. Colours are the page's CSS classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from pocketlm.report.data import LinearResult, SizePart, StageResult
from pocketlm.report.kinds import kind_of
from pocketlm.report.words import bytes_text, error_text, number_text, signed_text

HEIGHT = 40.0


@dataclass(frozen=True)
class ErrorRow:
    """One kind of linear over all blocks.

    Attributes:
        kind: Path inside the block: ``self_attn.q_proj``.
        chart: One bar a block, all rows on the same scale.
        mean: Of the errors, in words.
        worst: The largest error and its block, in words.
    """

    kind: str
    chart: Markup
    mean: str
    worst: str


def error_rows(linears: Sequence[LinearResult]) -> list[ErrorRow]:
    """Bars of the error of each linear, by kind; those without a measured error are left out.

    Args:
        linears: In the order of the model.
    """
    kinds: dict[str, list[tuple[int, str, float]]] = {}
    for linear in linears:
        if linear.error is not None:
            kind, block = kind_of(linear.name)
            kinds.setdefault(kind, []).append((block, linear.name, linear.error))
    if not kinds:
        return []
    top = max(error for found in kinds.values() for _, _, error in found) or 1.0
    rows = []
    for kind, found in kinds.items():
        worst_block, _, worst = max(found, key=lambda item: item[2])
        mean = sum(error for _, _, error in found) / len(found)
        rows.append(
            ErrorRow(
                kind,
                _bars([(name, error) for _, name, error in found], top),
                error_text(mean),
                f"{error_text(worst)} in block {worst_block}",
            )
        )
    return rows


def size_bars(parts: Sequence[SizePart]) -> tuple[Markup, Markup]:
    """Two stacked bars on one scale: the original's bytes and the result's.

    Args:
        parts: In the order of their colours.

    Returns:
        The original's bar and the result's.
    """
    full = max(sum(p.original_bytes for p in parts), sum(p.compressed_bytes for p in parts), 1)
    original = [(part.name, part.original_bytes) for part in parts]
    compressed = [(part.name, part.compressed_bytes) for part in parts]
    return _stack(original, full, "original"), _stack(compressed, full, "compressed")


def waterfall(stages: Sequence[StageResult]) -> list[Markup]:
    """One floating bar a stage, the original left out: from the loss before it to the loss after.

    Args:
        stages: The original first.
    """
    losses = [stage.log_perplexity - stages[0].log_perplexity for stage in stages]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    return [
        Markup(
            '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            'aria-label="from {} to {} nats over the original">'
            '<rect x="{:.2f}" width="{:.2f}" height="10" class="{}"/></svg>'
        ).format(
            signed_text(before), signed_text(after), 100 * (min(before, after) - low) / span,
            max(100 * abs(after - before) / span, 0.4), "c4" if after > before else "c2",
        )
        for before, after in pairwise(losses)
    ]  # fmt: skip


def share_bar(value: float, full: float) -> Markup:
    """One plain bar, `value` of `full`; the figure stands beside it."""
    width = 100 * value / full if full else 0
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.2f}" height="10" class="c0"/></svg>'
    ).format(max(width, 0.4))


def _bars(values: Sequence[tuple[str, float]], top: float) -> Markup:
    step = 100 / len(values)
    rects = Markup("").join(
        Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" class="c0">').format(
            i * step, HEIGHT * (1 - error / top), step * 0.8, max(HEIGHT * error / top, 0.5)
        )
        + Markup("<title>{}: {}</title></rect>").format(name, error_text(error))
        for i, (name, error) in enumerate(values)
    )
    label = f"{len(values)} bars from {values[0][0]} to {values[-1][0]}"
    return Markup(
        '<svg class="bars" viewBox="0 0 100 {:.0f}" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(HEIGHT, label, rects)


def _stack(values: Sequence[tuple[str, int]], full: int, who: str) -> Markup:
    rects, x = Markup(""), 0.0
    for colour, (name, count) in enumerate(values):
        width = 100 * count / full
        if count:
            rects += Markup(
                '<rect x="{:.3f}" width="{:.3f}" height="10" class="c{}"><title>{}</title></rect>'
            ).format(x, width, colour % 6, f"{name}: {bytes_text(count)}")
        x += width
    label = f"{who}: " + ", ".join(f"{name} {bytes_text(count)}" for name, count in values if count)
    return Markup(
        '<svg class="stack" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(label, rects)


def factor_text(predicted: float, actual: float | None) -> str:
    """An outcome against its prediction: ``× 1.07``."""
    return f"× {number_text(actual / predicted)}" if actual is not None and predicted else ""
