"""`report.html`: one self-contained page, no script, no network; the template escapes all."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from pocketlm.formats.shards import write_file
from pocketlm.report import charts, summary, words
from pocketlm.report.data import FOLDER, Remark, ReportData
from pocketlm.report.loading import Loading
from pocketlm.report.verdict import RULE, verdict

PAGE = "report.html"
TEMPLATE = "report.html.j2"
_LOOSE = re.compile(r"(?<=\d) (?=(?:%|B|kB|MB|GB|TB|s|min|h)\b|%)|(?<=×) (?=\d)")


def render(data: ReportData, ways: Sequence[Loading] = (), licence: str = "") -> str:
    """The page as text.

    Args:
        data: What was measured.
        ways: How each engine loads the artifact.
        licence: Of the weights, as a sentence.
    """
    size_original, size_compressed = charts.size_bars(data.sizes)
    return _template().render(
        data=data,
        verdict=verdict(data),
        rule=RULE,
        ways=ways,
        licence=licence,
        tiles=summary.tiles(data),
        size_rows=summary.size_rows(data),
        quality_rows=summary.quality_rows(data),
        speed_rows=summary.speed_rows(data),
        falls=charts.waterfall(data.stages) if data.stages else [],
        errors=charts.error_rows(data.linears),
        size_original=size_original,
        size_compressed=size_compressed,
        share_bar=charts.share_bar,
        factor=charts.factor_text,
        quantity=words.quantity_text,
        remarks=_grouped((*data.remarks, *_measuring(data))),
        actions=_actions(data),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pocketlm.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=words.bytes_text,
        seconds=words.seconds_text,
        number=words.number_text,
        signed=words.signed_text,
        percent=words.percent_text,
        interval=words.interval_text,
        share=words.share_text,
        points=words.points_text,
        tight=_tight,
        code=_code,
    )
    return environment.get_template(TEMPLATE)


def write_report(
    artifact_dir: str | Path,
    data: ReportData,
    ways: Sequence[Loading] = (),
    licence: str = "",
) -> Path:
    """Writes ``pocketlm/report.html``, whole or not at all.

    Args:
        artifact_dir: The artifact.
        data: What was measured.
        ways: As for `render`.
        licence: As for `render`.

    Returns:
        The file.
    """
    path = Path(artifact_dir) / FOLDER / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, render(data, ways, licence).encode())
    return path


def _tight(text: str) -> str:
    """No line break between a figure and its unit, or a sign and its figure."""
    return _LOOSE.sub("\u00a0", text)


def _code(text: str) -> Markup:
    """What stands between backticks becomes code; all is escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


def _measuring(data: ReportData) -> list[Remark]:
    """What the measurements had to tell."""
    found = [(data.quality, "evaluation"), (data.speed, "speed"), (data.original_speed, "speed")]
    return [
        Remark(kind=kind, where="", text=text)
        for report, kind in found
        if report is not None
        for text in report.notes
    ]


def _grouped(remarks: tuple[Remark, ...]) -> Mapping[tuple[str, str], list[str]]:
    """Equal sentences once, with all their places: 200 layers may say the same."""
    found: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        places = found.setdefault((remark.kind, remark.text), [])
        if remark.where:
            places.append(remark.where)
    return found


def _actions(data: ReportData) -> Mapping[str, int]:
    """How many tensors met each fate."""
    found: dict[str, int] = {}
    for row in data.ledger:
        found[row.action] = found.get(row.action, 0) + 1
    return found
