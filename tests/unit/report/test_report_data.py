"""Metrics on disk, figures in words, the table, and the ledger's way into the report."""

from pathlib import Path

import pytest
import torch

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import QuantSpec
from pocketlm.core.views import TensorInfo
from pocketlm.engine.health import InputHealth
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.report import charts, words
from pocketlm.report.data import LinearResult, ReportData, read_metrics
from pocketlm.report.data import write_metrics as write
from pocketlm.report.ledger import (
    input_rows,
    ledger_remarks,
    ledger_rows,
    linear_results,
    size_parts,
)
from pocketlm.report.summary import before_after, headline, tiles


def test_metrics_round_trip(full: ReportData, tmp_path: Path) -> None:
    assert write(tmp_path, full) == tmp_path / "pocketlm" / "metrics.json"
    assert read_metrics(tmp_path) == full


def test_metrics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"metrics\.json: cannot be read"):
        read_metrics(tmp_path)
    (tmp_path / "pocketlm").mkdir()
    (tmp_path / "pocketlm" / "metrics.json").write_text('{"title": 1}')
    with pytest.raises(ArtifactError, match="'title'"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (words.bytes_text(111_000_000), "111 MB"),
        (words.bytes_text(86_312_000), "86.3 MB"),
        (words.bytes_text(999), "999 B"),
        (words.bytes_text(1.6e10), "16 GB"),
        (words.bytes_text(None), "–"),
        (words.seconds_text(0.41), "0.41 s"),
        (words.seconds_text(59.7), "1 min 00 s"),
        (words.seconds_text(192), "3 min 12 s"),
        (words.seconds_text(7500), "2 h 05 min"),
        (words.number_text(1234.5), "1,234"),
        (words.number_text(17.349, 4), "17.35"),
        (words.number_text(0.0031249), "0.00312"),
        (words.number_text(0.0000123), "1.23e-05"),
        (words.number_text(999.7), "1000"),
        (words.number_text(0), "0"),
        (words.signed_text(-0.02), "−0.02"),
        (words.percent_text(0.9345), "93.5 %"),
        (words.quantity_text(2, "bits"), "2 bits"),
    ],
)
def test_figures_in_words(text: str, wanted: str) -> None:
    assert text == wanted


def test_the_table_compares(full: ReportData, bare: ReportData) -> None:
    rows = {row.label: row for row in before_after(full)}
    assert rows["Weights on disk"].change == "× 0.413"
    assert rows["Bits per weight, all"].compressed == "6.6"
    assert rows["Perplexity"].change == "+4.71 %"
    assert rows["Log-perplexity, nats/token"].interval == "+0.0417 to +0.0509"
    assert rows["Decode, tokens/s"].change == "× 2.49"
    assert rows["Peak memory"].compressed == "720 MB"
    unmeasured = {row.label: row for row in before_after(bare)}
    assert unmeasured["Decode, tokens/s"].compressed == "–"
    assert unmeasured["Perplexity"].original == "–"
    assert len(tiles(full)) == 4
    assert len(tiles(bare)) == 1
    assert "2.42× smaller" in headline(full)


@pytest.fixture
def ledger() -> Ledger:
    """Two blocks' worth of fates."""
    quantized = Entry(
        action="quantized",
        reason="recipe",
        shape=(8, 16),
        bits=8 * 16 * 4 + 8 * 16,
        spec=QuantSpec(group_size=16),
        error=0.01,
        notes=["group size 16 instead of 128."],
        outputs=["model.layers.0.q.weight_packed", "model.layers.0.q.weight_scale"],
    )
    kept = {
        name: Entry(action="kept", reason="kept", shape=shape, bits=16, outputs=[name])
        for name, shape in {
            "model.embed.weight": (32, 16),
            "lm_head.weight": (32, 16),
            "model.layers.0.norm.weight": (16,),
            "model.layers.0.router.weight": (4, 16),
        }.items()
    }
    return Ledger(
        source="tiny",
        format="compressed-tensors",
        fingerprint={},
        tensors={"model.layers.0.q.weight": quantized, **kept},
        warnings=["too few windows."],
    )


def test_the_ledger_is_shown(ledger: Ledger) -> None:
    rows = ledger_rows(ledger)
    assert (rows[0].action, rows[0].bits) == ("quantized", 5.0)
    assert linear_results(ledger) == (LinearResult(name="model.layers.0.q", bits=5.0, error=0.01),)
    remarks = ledger_remarks(ledger)
    assert [(r.kind, r.where) for r in remarks] == [
        ("warning", ""),
        ("fallback", "model.layers.0.q.weight"),
    ]


def test_every_byte_has_its_part(ledger: Ledger) -> None:
    def info(name: str, dtype: torch.dtype, *shape: int) -> tuple[str, TensorInfo]:
        return name, TensorInfo(name, dtype, shape)

    kept = [
        info(name, torch.bfloat16, *entry.shape)
        for name, entry in ledger.tensors.items()
        if entry.action == "kept"
    ]
    original = dict([info("model.layers.0.q.weight", torch.bfloat16, 8, 16), *kept])
    written = dict(
        [
            info("model.layers.0.q.weight_packed", torch.int32, 8, 2),
            info("model.layers.0.q.weight_scale", torch.bfloat16, 8, 1),
            *kept,
        ]
    )
    parts = {p.name: p for p in size_parts(original, written, ledger, ["model.layers.0"])}
    assert {name: (p.original_bytes, p.compressed_bytes) for name, p in parts.items()} == {
        "embedding": (1024, 1024),
        "head": (1024, 1024),
        "compressed linears": (256, 64),
        "linears kept as they are": (128, 128),
        "norms and biases": (32, 32),
        "scales, zero points and masks": (0, 16),
    }
    total = sum(info.bytes_stored for info in written.values())
    assert sum(p.compressed_bytes for p in parts.values()) == total


def test_bars_are_on_one_scale_and_by_kind() -> None:
    linears = [
        LinearResult(name=f"model.layers.{b}.{kind}", bits=4.0, error=error * (b + 1))
        for b in range(2)
        for kind, error in (("mlp.up", 0.01), ("mlp.down", 0.04), ("mlp.experts.3.up", 0.02))
    ]
    rows = charts.error_rows(linears)
    assert [row.kind for row in rows] == ["mlp.up", "mlp.down", "mlp.experts.*.up"]
    assert rows[1].worst == "8.00 % in block 1"
    assert rows[0].mean == "1.50 %"
    assert 'height="40.00"' in rows[1].chart
    assert 'height="10.00"' in rows[0].chart
    assert "model.layers.0.mlp.up: 1.00 %" in rows[0].chart
    unmeasured = LinearResult(name="a.0.b", bits=None, error=None)
    assert charts.error_rows([unmeasured]) == []


def test_inputs_are_told_by_kind() -> None:
    def entry(tokens: int, rank: float, dead: int = 0) -> Entry:
        return Entry(
            action="quantized", reason="", shape=(8, 16), bits=512,
            inputs=InputHealth(tokens=tokens, columns=16, effective_rank=rank, dead_columns=dead,
                               constant_columns=1),
        )  # fmt: skip

    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": entry(0, 0.0),
        "model.layers.0.mlp.experts.1.up_proj.weight": entry(9, 4.0, dead=2),
        "model.layers.1.mlp.experts.0.up_proj.weight": entry(400, 11.5),
        "model.layers.1.self_attn.q_proj.weight": entry(500, 2.5),
        "model.norm.weight": Entry(action="kept", reason="", shape=(16,), bits=256),
    }
    ledger = Ledger(source="m", format="compressed-tensors", fingerprint={}, tensors=tensors)
    experts, query = input_rows(ledger)
    assert (experts.kind, experts.linears) == ("mlp.experts.*.up_proj", 3)
    assert (experts.tokens_least, experts.tokens_most) == (0, 400)
    assert (experts.rank_least, experts.rank_most) == (4.0, 11.5)
    assert (experts.dead_columns, experts.constant_columns) == (2, 3)
    assert (experts.few, experts.unreached) == (1, 1)
    assert (query.kind, query.rank_least) == ("self_attn.q_proj", 2.5)
    none, few = ledger.calibration_warnings()
    assert "reached 1 linears" in none
    assert "model.layers.0.mlp.experts.1.up_proj.weight: 9 for 16" in few


def test_a_small_error_keeps_its_digits():
    assert [words.error_text(e) for e in (0.1076, 0.0031, 3.12e-5, 0.0)] == [
        "10.76 %",
        "0.31 %",
        "0.00312 %",
        "0 %",
    ]
