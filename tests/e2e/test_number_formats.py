"""Number formats by name, through the command line: compressed, verified, run; bad combinations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.conftest import Done
from tests.e2e.test_errors import refuses

Cli = Callable[..., Done]
FEW = ("--samples", "4", "--seq-len", "32", "--device", "cpu")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("scheme", "method", "storage"),
    [
        ("NVFP4", "gptq", "nvfp4-pack-quantized"),
        pytest.param("NF4_DQ", "rtn", None, marks=pytest.mark.slow),
    ],
)
def test_a_scheme_from_start_to_end(
    cli: Cli, source: Path, tmp_path: Path, scheme: str, method: str, storage: str | None
) -> None:
    out = tmp_path / "out"
    flags = ("--scheme", scheme, "--method", method, *FEW)
    planned = cli("plan", source, "--json", *flags).json
    made = cli("compress", source, "-o", out, "--json", *flags).json
    assert made["bits_per_weight"] == pytest.approx(planned["bits_per_weight"])
    section = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert section.get("format") == storage
    verified = cli("verify", out, "--against", source, "--json")
    assert verified.code == 0, verified.out
    logits = next(c for c in verified.json["checks"] if c["name"] == "transformers logits")
    assert "bit-equal" in logits["message"]
    assert scheme.partition("_")[0] in (out / "README.md").read_text("utf-8")
    done = cli("generate", out, "-p", "Hello", "--max-new-tokens", "3", "--device", "cpu", "--json")
    assert 1 <= len(done.json["tokens"]) <= 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scheme", "NVFP4", "--group-size", "64"), "has groups of 16, not 64"),
        (("--scheme", "NF4", "--asym"), "only 'int' and 'k' may be asymmetric"),
        (("--scheme", "MXFP4", "--bits", "8"), "MXFP4 has 4 bits"),
        (("--scheme", "NVFP"), "NVFP4"),
    ],
)
def test_contradictions(
    cli: Cli, source: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    done = cli("compress", source, "-o", tmp_path / "out", "--json", *flags, *FEW)
    assert done.code == 2
    error = done.json["error"]
    assert error["type"] == "ConfigError"
    assert said in f"{error['what']} {error['remedy']}"


def test_a_target_that_does_not_run_it(cli: Cli, source: Path, tmp_path: Path) -> None:
    flags = ("--scheme", "NF4", "--target", "vllm", "--group-size", "-1")
    refuses(cli, source, tmp_path / "out", "UnsupportedLayer", "format pocketlm", flags=flags)
