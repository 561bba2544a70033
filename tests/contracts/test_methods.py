"""What every method of the catalog owes, in one matrix: one row a method, one run a row.

A run stores the bytes that its plan names, accounts for every tensor and bit, stays near the
original, repeats itself, and a run that is killed after its first block goes on to the same bytes.
Asked for nothing it writes the source; what prunes or factorises does it on a mixture of experts
too. A new method needs a row here: without one `test_every_method_has_a_row` fails. What only one
kind of method owes stands with its unit tests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.conftest import save_model, save_tokenizer
from tests.unit.models.families import build

from pocketlm import api, compression
from pocketlm.catalog import METHODS, method_class
from pocketlm.core.errors import UnsupportedLayer
from pocketlm.engine.journal import Journal
from pocketlm.evaluate.verify_files import Artifact, checks
from pocketlm.evaluate.verify_logits import view_logits
from pocketlm.models import open_model

pytestmark = pytest.mark.usefixtures("checked_shapes")
W8 = {"bits": 8, "group_size": None}
W4 = {"bits": 4, "group_size": 32}
HALF = {"sparsity": "2:4"}
TEXT = Path(__file__).parents[2] / "LICENSE"  # builtin's words differ between releases of Python
TOKENS = [(3 + 7 * i) % 96 for i in range(24)]


@dataclass(frozen=True)
class Row:
    """A recipe with the method in it.

    Attributes:
        steps: Of the recipe.
        near: Largest relative distance of the logits from the original's.
        weights: Number format; None: weights stay floats.
        family: Of the model.
        looks: Whether it goes through the model block by block, so that it can be stopped there.
    """

    steps: tuple[Any, ...]
    near: float
    weights: dict[str, Any] | None = None
    family: str = "llama"
    looks: bool = True


def row(
    method: str, near: float, *after: Any, before: tuple[Any, ...] = (), weights: Any = None,
    family: str = "llama", looks: bool = True, **options: Any,
) -> Row:  # fmt: skip
    """The method with options between the steps that it needs."""
    return Row((*before, {"method": method, **options}, *after), near, weights, family, looks)


# Relative distances of the logits; a model that has nothing to do with another is off by 1.4.
NEAR_8, NEAR_4, HALVED, NARROWER, RANDOM_SPECTRUM = 0.03, 0.25, 0.8, 0.35, 1.0
ROWS = {
    "rtn": row("rtn", NEAR_8, weights=W8),
    "clip": row("clip", NEAR_8, "rtn", weights=W8),
    "gptq": row("gptq", NEAR_8, weights=W8),
    "refine": row("refine", NEAR_8, before=("rtn",), weights=W8),
    "hqq": row("hqq", NEAR_8, weights=W8),
    "llm_int8": row("llm_int8", NEAR_8, weights=W8),
    "awq": row("awq", NEAR_8, "rtn", steps=2, weights=W8),
    "smoothquant": row("smoothquant", NEAR_8, "rtn", weights=W8),
    "correct": row("correct", NEAR_8, "gptq", weights=W8),
    "autoround": row("autoround", NEAR_4, iters=2, weights=W4),
    "learned_clip": row("learned_clip", NEAR_4, "rtn", epochs=1, weights=W4),
    "lkd": row("lkd", NEAR_4, iters=2, weights=W4),
    "magnitude": row("magnitude", HALVED, **HALF),
    "wanda": row("wanda", HALVED, **HALF),
    "ria": row("ria", HALVED, **HALF),
    "esparse": row("esparse", HALVED, **HALF),
    "gblm": row("gblm", HALVED, **HALF),
    "dsnot": row("dsnot", HALVED, **HALF),
    "sparsegpt": row("sparsegpt", HALVED, **HALF),
    "sparsegpt_joint": row("sparsegpt_joint", HALVED, weights=W8, **HALF),
    "alps": row("alps", HALVED, **HALF),
    "tune": row("tune", HALVED, before=({"method": "wanda", **HALF},), iters=2),
    "svd": row("svd", RANDOM_SPECTRUM, ratio=0.2, multiple_of=1),
    "fwsvd": row("fwsvd", RANDOM_SPECTRUM, ratio=0.2, multiple_of=1),
    "asvd": row("asvd", RANDOM_SPECTRUM, ratio=0.2, multiple_of=1),
    "svd_llm": row("svd_llm", RANDOM_SPECTRUM, ratio=0.2, multiple_of=1),
    "laser": row("laser", NEAR_4, layers="1", keep=0.5),
    "losparse": row("losparse", RANDOM_SPECTRUM, ratio=0.2, multiple_of=1, density=0.1, rounds=2),
    "lqer": row("lqer", NEAR_4, before=("rtn",), rank=4, group_size=32, weights=W4),
    "lorc": row("lorc", NEAR_4, before=("rtn",), rank=4, bits=None, weights=W4),
    "caldera": row("caldera", NEAR_4, before=("gptq",), rank=4, iterations=2, weights=W4),
    "depth": row("depth", 1, blocks=1),
    "shortgpt": row("shortgpt", 1, blocks=1),
    "flap": row("flap", NARROWER, channels=64),
    "wanda_sp": row("wanda_sp", NARROWER, channels=64),
    "minitron": row("minitron", NARROWER, channels=64),
    "slicegpt": row("slicegpt", HALVED, hidden=48),
    "experts": row("experts", NARROWER, keep=3, family="mixtral"),
    "permute": row("permute", 1e-4),
    "laco": row("laco", 1.3, looks=False, blocks=1, threshold=0.01),
    "llm_pruner": row("llm_pruner", NARROWER, looks=False, channels=64),
}
# What prunes or factorises runs on a mixture of experts too, with other sizes where widths are cut.
DENSE_ONLY = {"slicegpt": "gate: it reads the stream"}  # and what the refusal says
SMALLER = {name for name in METHODS if method_class(name).makes & {"mask", "factors", "shape"}}
MIXTURES = {
    **{name: ROWS[name] for name in ROWS if name in {*SMALLER, "tune"} - {*DENSE_ONLY, "experts"}},
    **{n: row(n, NARROWER, channels=32) for n in ("flap", "wanda_sp", "minitron", "llm_pruner")},
}
NOTHING: dict[str, dict[str, Any]] = {
    **{name: {"sparsity": 0} for name in ROWS if "mask" in method_class(name).makes},
    **{name: {"ratio": 0} for name in SMALLER if "ratio" in method_class(name).model_fields},
}
for name in ("slicegpt", "sparsegpt_joint"):  # turns the stream; rounds
    del NOTHING[name]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family that rows ask for, with a tokenizer."""
    root = tmp_path_factory.mktemp("contracts")
    torch.manual_seed(0)
    build("mixtral", torch.bfloat16, vocab_size=300).save_pretrained(root / "mixtral")
    save_tokenizer(root / "mixtral")
    sizes = {"num_hidden_layers": 2, "initializer_range": 0.05}
    return {"mixtral": root / "mixtral", "llama": save_model(root / "llama", **sizes)}


@pytest.fixture(scope="module")
def originals(sources: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The logits of each."""
    return {family: logits(path) for family, path in sources.items()}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports tell times: all else of a run is the same every time."""
    monkeypatch.setattr(compression, "write_report", lambda *_: None)


class Killed(Exception):
    """Stands for a kill: nothing but `finally` blocks run."""


def digests(output: Path) -> dict[str, str]:
    files = [p for p in sorted(output.rglob("*")) if p.is_file() and p.name != "events.jsonl"]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def logits(path: Path) -> torch.Tensor:
    return view_logits(open_model(path, allow_compressed=True), TOKENS)


def distance(path: Path, before: torch.Tensor) -> float:
    """How far its logits are from others, over those."""
    return float((logits(path) - before).norm() / before.norm())


def compress(source: Path, recipe: dict[str, Any], output: Path) -> api.CompressResult:
    return api.compress(
        source, recipe, output, samples=4, seq_len=32, calibration=TEXT, device="cpu"
    )


def check_whole(made: api.CompressResult, source: Path) -> None:
    """An artifact has the bytes that its plan names, and is what its ledger says, or it raises."""
    stored = load_file(made.output / "model.safetensors").values()
    assert made.plan.output_bytes == sum(t.numel() * t.element_size() for t in stored)
    assert made.plan.bits_per_weight == pytest.approx(made.bits_per_weight)
    artifact = Artifact.open(made.output)
    for _, _, check in checks(source):
        check(artifact)


def test_every_method_has_a_row() -> None:
    assert ROWS.keys() == METHODS.keys()
    for name, asked in ROWS.items():
        assert name in [step["method"] for step in asked.steps if isinstance(step, dict)]


@pytest.mark.parametrize("name", ROWS)
def test_a_run_is_whole_near_and_repeats_itself(
    name: str,
    sources: dict[str, Path],
    originals: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ROWS[name]
    source = sources[asked.family]
    recipe = {"steps": list(asked.steps), "weights": asked.weights, "ignore": ["lm_head"]}

    check_whole(compress(source, recipe, tmp_path / "whole"), source)
    assert distance(tmp_path / "whole", originals[asked.family]) < asked.near

    write, written = Journal.write_block, []

    def stop(journal: Journal, index: int, *arguments: Any) -> None:
        write(journal, index, *arguments)
        written.append(index)
        if len(written) == 1:
            raise Killed

    monkeypatch.setattr(Journal, "write_block", stop)
    if asked.looks:
        with pytest.raises(Killed):
            compress(source, recipe, tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
    compress(source, recipe, tmp_path / "parts")
    assert len(set(written)) == len(written), "a finished block was done again"
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_whole_and_near(
    name: str, sources: dict[str, Path], originals: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    asked = MIXTURES[name]
    recipe = {"steps": list(asked.steps), "weights": asked.weights, "ignore": ["lm_head"]}
    made = compress(sources["mixtral"], recipe, tmp_path / "out")
    check_whole(made, sources["mixtral"])
    assert 0 < distance(tmp_path / "out", originals["mixtral"]) < asked.near


@pytest.mark.parametrize("name", DENSE_ONLY)
def test_what_knows_no_mixture_says_so(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayer, match=DENSE_ONLY[name]):
        compress(sources["mixtral"], {"steps": [name], "weights": None}, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_nothing_asked_for_writes_the_source(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {"steps": [{"method": name, **NOTHING[name]}], "weights": None}
    source = sources[ROWS[name].family]
    compress(source, recipe, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[tensor], value) for tensor, value in original.items())
