"""The page: everything in it, nothing from outside, everything escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path

from tests.unit.report.test_card import CONFIG, ledger

from pocketlm.report.charts import waterfall
from pocketlm.report.data import Answer, ReportData, StageResult
from pocketlm.report.html import render, write_report
from pocketlm.report.loading import loadings

WAYS = loadings(CONFIG, ledger(), "here")
SECTIONS = ("size", "quality", "speed", "damage", "making", "loading", "remarks")
VOID = {"meta", "rect", "br", "img", "link"}


class Balance(HTMLParser):
    """Fails on a tag that is closed wrongly; collects ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)
        self._note(dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._note(dict(attrs))

    def _note(self, attrs):
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(data: ReportData) -> Balance:
    balance = Balance()
    balance.feed(render(data))
    balance.close()
    assert balance.open == []
    return balance


def test_the_page_is_whole_and_needs_no_network(full: ReportData) -> None:
    page = parsed(full)
    for link in page.links:
        assert link.startswith("#")
        assert link[1:] in page.ids
    text = render(full)
    assert "<script" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(text) < 300_000


def test_everything_measured_is_on_it(full: ReportData) -> None:
    text = " ".join(parsed(full).text).replace("\u00a0", " ")
    for wanted in (
        "269 MB", "111 MB", "2.42×", "17.34", "+0.0463", "91.2 %", "27.9", "720 MB",
        "wikitext2-test.txt", "sha256 abababababab", "a city on the Seine", "self_attn.q_proj",
        "scales, zero points and masks", "1 min 23 s", "113 MB",
        "calibration on 45 windows, not 64.",
        "210 places", "evaluation on 60 windows, not 100.",
        "method: gptq", "model.layers.29.mlp.down_proj.weight",
        "1 kept, 210 quantized", "pocketlm compress smollm2-135m",
        "43.2 %", "−1.5", "−3.0 to −0.0", "flipped answers: 311",
        "Regression at a margin of 1 point",
        "9,545 different ones", "30 × 576", "33 to 146",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_what_was_not_measured_is_said(bare: ReportData) -> None:
    text = " ".join(parsed(bare).text)
    assert "Not judged yet" in text
    assert "Quality has not been measured yet" in text
    assert "Quality was not measured" in text
    assert "Speed was not measured" in text
    assert "None" not in text.replace("None: the run had", "")


def test_the_verdict_stands_first_and_parts_in_reading_order(full: ReportData) -> None:
    text = render(full, WAYS)
    order = [text.index(part) for part in ('class="verdict', 'class="tiles"')]
    order += [text.index(f'<section id="{name}">') for name in SECTIONS]
    assert order == sorted(order)
    assert "Regression on arc_easy" in text


def test_it_tells_how_each_engine_loads_it(full: ReportData) -> None:
    page = Balance()
    page.feed(render(full, WAYS, "That of the base model: apache-2.0."))
    text = " ".join(page.text)
    assert "vllm serve here" in text
    assert "compressed-tensors>=0.15.0" in text
    assert "llama-cli" in text
    assert 'pocketlm.load("here")' in text
    assert "That of the base model: apache-2.0." in text
    assert "`" not in text
    assert "#loading" not in parsed(full).links


def test_stages_are_a_waterfall(full: ReportData) -> None:
    losses = {"original": 2.8, "shortgpt": 3.0, "gptq": 3.2, "heal": 2.9}
    stages = tuple(StageResult(name=n, log_perplexity=x, kl=x - 2.8) for n, x in losses.items())
    pattern = r'<rect x="([\d.]+)" width="([\d.]+)".*?class="(c\d)"'
    bars = re.findall(pattern, "".join(waterfall(stages)))
    assert bars == [("0.00", "50.00", "c4"), ("50.00", "50.00", "c4"), ("25.00", "75.00", "c2")]
    assert "Damage by stage" in render(full.model_copy(update={"stages": stages}))


def test_all_text_is_escaped(full: ReportData) -> None:
    evil = '<img src=x onerror="alert(1)">&amp;'
    linear = full.linears[0].model_copy(update={"name": f"model.layers.0.{evil}"})
    size = full.sizes[0].model_copy(update={"name": evil})
    data = full.model_copy(
        update={
            "title": evil,
            "recipe_yaml": evil,
            "answers": (Answer(prompt=evil, original=evil, compressed=evil),),
            "remarks": tuple(r.model_copy(update={"text": evil}) for r in full.remarks),
            "linears": (linear,),
            "sizes": (size,),
        }
    )
    assert "<img" not in render(data)
    page = parsed(data)
    assert sum(evil in text for text in page.text) >= 6


def test_tables_and_drawings_are_described(full: ReportData) -> None:
    text = render(full)
    for drawing in re.findall(r"<svg[^>]*>", text):
        assert 'aria-hidden="true"' in drawing or 'aria-label="' in drawing
    assert text.count("<caption>") >= 4
    assert 'lang="en"' in text
    assert 'name="viewport"' in text


def test_the_file_appears_whole(full: ReportData, tmp_path: Path) -> None:
    path = write_report(tmp_path, full)
    assert path == tmp_path / "pocketlm" / "report.html"
    assert path.read_text(encoding="utf-8") == render(full)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
