"""Budgets through the command line: search, plan and compress agree, and keep to real bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.e2e.conftest import QUICK, Done

Cli = Callable[..., Done]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's searches keep what they measure."""
    return tmp_path_factory.mktemp("findings")


def weight_bytes(artifact: Path) -> int:
    return sum(file.stat().st_size for file in artifact.glob("*.safetensors*"))


def test_search_writes_a_recipe_that_compress_takes(cli: Cli, source, findings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    asked = ("search", source, "--bits", "5.0", "--group-size", "32", "--target", "vllm")
    found = cli(*asked, "-o", recipe, "--search-dir", findings, "--device", "cpu", "--json")
    assert found.code == 0, found.err
    chosen = found.json["chosen"]
    assert 4.5 <= chosen["bits_per_weight"] <= 5.0
    assert set(yaml.safe_load(recipe.read_text("utf-8"))) >= {"steps", "weights", "overrides"}
    drawn = cli(*asked, "--search-dir", findings, "--device", "cpu")
    assert "← chosen" in drawn.out
    made = cli("compress", source, "-o", tmp_path / "out", "--recipe", recipe, "--target", "vllm",
               "--json", *QUICK[:4])  # fmt: skip
    assert made.code == 0, made.err
    assert made.json["bits_per_weight"] == pytest.approx(chosen["bits_per_weight"])
    other = cli(*asked[:2], "--bits", "6.0", *asked[4:], "-o", recipe, "--search-dir", findings)
    assert other.code == 2
    assert "says something else" in other.err


def test_compress_within_a_size(cli: Cli, source, findings, tmp_path):
    asked = ("--target", "vllm", "--search-dir", findings, *QUICK)
    free = cli("plan", source, "--bits", "6.0", "--json", *asked)
    assert free.code == 0, free.err
    assert 5.5 < free.json["bits_per_weight"] <= 6.0
    assert sum(free.json["grids"].values()) == 14
    size = free.json["output_bytes"] + 9000  # headers are counted too
    made = cli("compress", source, "-o", tmp_path / "out", "--size", size, "--json", *asked)
    assert made.code == 0, made.err
    assert 0.8 * size < weight_bytes(tmp_path / "out") <= size
    assert (tmp_path / "out" / "pocketlm" / "recipe.yaml").exists()
    again = cli("compress", source, "-o", tmp_path / "out", "--size", size, "--json", *asked)
    assert again.json["already_done"] is True
    least = cli("plan", source, "--size", "10kB", "--json", *asked)
    assert least.json["error"]["type"] == "BudgetError"
    assert "smallest possible" in least.json["error"]["what"]


def test_no_recipe_without_a_budget(cli: Cli, source, tmp_path):
    done = cli("search", source, "-o", tmp_path / "recipe.yaml")
    assert done.code == 2
    assert "no recipe without a budget" in done.err
