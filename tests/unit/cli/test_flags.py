"""What flags become, and which of them contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketlm.cli.units import parse_bytes
from pocketlm.core.errors import ConfigError


def test_flags_reach_the_api_by_name(api, cli, tmp_path):
    api.answers["build_recipe"] = "the recipe"
    api.answers["compress"] = RuntimeError("far enough")
    cli(
        "compress", "model", "-o", tmp_path / "out", "--method", "gptq", "--scheme", "W3A16",
        "--group-size", "64", "--asym", "--ignore", "a", "--ignore", "re:b", "--samples", "8",
        "--seq-len", "256", "--seed", "5", "--device", "cpu", "--dtype", "float32",
        "--threads", "2", "--work-dir", tmp_path / "work", "--activation-budget", "1.5GiB",
        "--target", "vllm", "--calibration", "text.txt", "--restart", "--trust-remote-code",
        "--revision", "main",
    )  # fmt: skip
    assert api.calls["build_recipe"] == (
        (),
        {
            "recipe": None, "method": "gptq", "scheme": "W3A16", "bits": None, "group_size": 64,
            "symmetric": False, "sparsity": None,
        },
    )  # fmt: skip
    args, options = api.calls["compress"]
    assert args == ("model", "the recipe", tmp_path / "out")
    assert callable(options.pop("on_event"))
    assert options == {
        "ignore": ("a", "re:b"), "target": "vllm", "calibration": "text.txt", "samples": 8,
        "seq_len": 256, "seed": 5, "device": "cpu", "dtype": "float32", "threads": 2,
        "activation_budget_bytes": 3 << 29, "revision": "main", "trust_remote_code": True,
        "work_dir": tmp_path / "work", "resume": False,
    }  # fmt: skip


def test_aliases_of_other_tools(api, cli, tmp_path):
    cli(
        "compress", "model", "--output_dir", tmp_path, "--nsamples", "4", "--seqlen", "32",
        "--dataset", "x.txt", "--group_size", "32",
    )  # fmt: skip
    args, options = api.calls["compress"]
    assert args[2] == Path(tmp_path)
    assert (options["samples"], options["seq_len"], options["calibration"]) == (4, 32, "x.txt")
    assert api.calls["build_recipe"][1]["group_size"] == 32
    assert options["resume"] is True


def test_a_dry_run_only_plans(api, cli, capsys, tmp_path):
    api.answers["plan"] = {"seconds": 1}
    assert cli("compress", "model", "-o", tmp_path, "--dry-run", "--json") == 0
    assert "compress" not in api.calls
    assert capsys.readouterr().out.strip() == '{\n  "seconds": 1\n}'


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        (("--sym", "--asym"), "--sym and --asym"),
        (("--resume", "--restart"), "--resume and --restart"),
        (("--scheme", "W4A16", "--bits", "3"), "--scheme and --bits"),
        (("--scheme", "W4A17"), "--scheme"),
        (("--bits", "9"), "--bits"),
        (("--bits", "four"), "--bits"),
        (("--bits", "3.5", "--size", "90MB"), "--bits and --size"),
        (("--bits", "4", "--size", "90MB"), "--bits and --size"),
        (("--scheme", "W4A16", "--bits", "3.5"), "--scheme and --bits"),
        (("--scheme", "W4A16", "--size", "90MB"), "--scheme and --size"),
        (("--size", "small"), "--size"),
        (("--search-minutes", "5"), "--search-minutes and --search-dir"),
        (("--group-size", "3"), "--group-size"),
        (("--device", "gpu"), "--device"),
        (("--dtype", "bf16"), "--dtype"),
        (("--target", "vlm"), "--target"),
        (("--activation-budget", "much"), "--activation-budget"),
        (("--recipe", "absent.yaml"), "--recipe absent.yaml"),
    ],
)
def test_contradictions_and_unknown_values(api, cli, capsys, tmp_path, flags, place):
    assert cli("compress", "model", "-o", tmp_path / "out", *flags) == 2
    assert f"error: {place}: " in capsys.readouterr().err
    assert api.calls == {}
    assert not (tmp_path / "out").exists()


def test_a_whole_number_of_bits_is_a_width_and_a_decimal_a_budget(api, cli, tmp_path):
    cli("compress", "model", "-o", tmp_path / "out", "--bits", "3")
    assert api.calls["build_recipe"][1]["bits"] == 3
    assert "bits" not in api.calls["compress"][1]
    cli("compress", "model", "-o", tmp_path / "out", "--bits", "4.0", "--search-minutes", "5")
    assert api.calls["build_recipe"][1]["bits"] is None
    options = api.calls["compress"][1]
    assert (options["bits"], options["size"], options["search_minutes"]) == (4.0, None, 5)
    cli("plan", "model", "--size", "90MB", "--search-dir", tmp_path)
    options = api.calls["plan"][1]
    assert (options["bits"], options["size"]) == (None, 90_000_000)
    assert options["search_dir"] == tmp_path
    assert callable(options["on_event"])


def test_a_search_takes_a_whole_number_as_a_budget(api, cli):
    cli("search", "model", "--bits", "4")
    assert api.calls["search"][1]["bits"] == 4.0
    cli("search", "model", "--search-minutes", "5")
    assert api.calls["search"][1]["search_minutes"] == 5
    assert "bits" not in api.calls["search"][1]


def test_an_unknown_value_offers_the_nearest(cli, capsys, tmp_path):
    cli("compress", "model", "-o", tmp_path / "out", "--target", "vlm")
    assert "Did you mean 'vllm'?" in capsys.readouterr().err


def test_one_model_alone_cannot_be_compared(api, cli, capsys):
    assert cli("compare", "a") == 2
    assert "Name two or more." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("4096", 4096)],
)
def test_sizes(text, count):
    assert parse_bytes(text, "--size") == count


def test_no_size():
    with pytest.raises(ConfigError, match="--size: 'eight' is no size"):
        parse_bytes("eight", "--size")
    assert parse_bytes(None, "--size") is None


def test_tasks_and_gates_reach_the_api(api, cli, tmp_path):
    api.answers["evaluate"] = RuntimeError("far enough")
    cli(
        "eval", "out", "--against", "model", "--gate", "kl<0.05", "--gate", "piqa>0.5", "--tasks",
        "piqa, gsm8k", "--task-dir", "benchmarks/tasks", "--task-data", tmp_path, "--items", "7",
        "--margin", "0.02", "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    args, options = api.calls["evaluate"]
    assert args == ("out", "model")
    assert options["gates"] == ["kl<0.05", "piqa>0.5"]
    assert options["tasks"] == ["piqa", "gsm8k"]
    assert (options["task_dir"], options["task_data"]) == (Path("benchmarks/tasks"), tmp_path)
    assert (options["items"], options["margin"]) == (7, 0.02)
    assert options["cache_dir"] == tmp_path / "cache"
