"""Verbs, help, exit codes and errors, with the API replaced."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pocketlm.cli.main import VERBS
from pocketlm.core.errors import (
    ConfigError,
    GateFailed,
    GateUndecided,
    NumericError,
    ResourceError,
    SecurityError,
    SourceError,
)

FOLDER = Path("src/pocketlm/cli")


def error_of(text: str) -> dict[str, object]:
    return json.loads(text)["error"]


def test_help_lists_every_verb(cli, capsys):
    assert cli("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_json(cli, capsys, verb):
    assert cli(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert f"Example: pocketlm {verb}" in shown
    assert "--json" in shown


def test_the_version(cli, capsys):
    from pocketlm import __version__

    assert cli("--version") == 0
    assert capsys.readouterr().out == f"pocketlm {__version__}\n"


def test_an_unknown_verb_offers_the_nearest(cli, capsys):
    assert cli("comprss") == 2
    assert "Did you mean 'compress'?" in capsys.readouterr().err


def test_an_unknown_flag_offers_the_nearest(cli, capsys):
    assert cli("plan", "model", "--schem", "W4A16") == 2
    shown = capsys.readouterr().err
    assert "--schem" in shown
    assert "--scheme" in shown.replace("--schem ", "")


def test_a_missing_flag_is_named(cli, capsys):
    assert cli("compress", "model") == 2
    assert "--output" in capsys.readouterr().err


def test_usage_errors_are_json_on_request(cli, capsys):
    assert cli("compress", "model", "--json") == 2
    captured = capsys.readouterr()
    error = error_of(captured.out)
    assert error["type"] == "ConfigError"
    assert error["exit_code"] == 2
    assert captured.err == ""


@pytest.mark.parametrize(
    ("raised", "code", "kind"),
    [
        (ConfigError("a.", where="b", remedy="Do c."), 2, "ConfigError"),
        (SourceError("a.", where="b", remedy="Do c."), 2, "SourceError"),
        (NumericError("a.", where="b", remedy="Do c."), 3, "NumericError"),
        (GateFailed("a.", where="b", remedy="Do c."), 4, "GateFailed"),
        (GateUndecided("a.", where="b", remedy="Do c."), 5, "GateUndecided"),
    ],
)
def test_typed_errors_keep_their_three_parts(api, cli, capsys, raised, code, kind):
    api.answers["inspect"] = raised
    assert cli("inspect", "model", "--json") == code
    assert error_of(capsys.readouterr().out) == {
        "type": kind, "what": "a.", "where": "b", "remedy": "Do c.", "exit_code": code,
    }  # fmt: skip
    assert cli("inspect", "model") == code
    captured = capsys.readouterr()
    assert captured.err == "error: b: a.\n  → Do c.\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(api, cli, capsys, raised):
    api.answers["inspect"] = raised
    assert cli("inspect", "model") == ResourceError.exit_code
    shown = capsys.readouterr().err
    assert "out of memory" in shown
    assert "--samples" in shown
    assert "Traceback" not in shown


def test_a_full_disk_is_named(api, cli, capsys):
    api.answers["inspect"] = OSError(errno.ENOSPC, "No space left on device", "out/model")
    assert cli("inspect", "model") == 3
    assert "out/model: the disk is full." in capsys.readouterr().err


def test_a_forbidden_file_is_no_bug(api, cli, capsys):
    api.answers["inspect"] = PermissionError(errno.EACCES, "Permission denied", "secret")
    assert cli("inspect", "model") == 2
    assert "secret: Permission denied." in capsys.readouterr().err


def test_anything_else_is_a_bug_with_its_traceback(api, cli, capsys):
    api.answers["inspect"] = ValueError("odd")
    assert cli("inspect", "model", "--json") == 1
    captured = capsys.readouterr()
    assert error_of(captured.out)["what"] == "ValueError: odd"
    assert "Traceback" in captured.err
    assert "bug in pocketlm" in str(error_of(captured.out)["remedy"])


def test_ctrl_c_says_that_work_is_kept(api, cli, capsys, tmp_path):
    api.answers["compress"] = KeyboardInterrupt()
    assert cli("compress", "model", "-o", tmp_path / "out") == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_a_real_signal_unwinds_and_the_handler_is_put_back(api, cli, capsys, tmp_path, monkeypatch):
    def interrupt(*_args: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(api, "compress", interrupt, raising=False)
    assert cli("compress", "model", "-o", tmp_path / "out") == 130
    assert "Ctrl-C again exits at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "verb", ["inspect", "generate --prompt hello", "chat", "roofline --device l4"]
)
def test_the_remedy_of_remote_code_is_an_option(cli, capsys, tmp_path, verb):
    config = {"model_type": "newest", "auto_map": {"AutoConfig": "code.Newest"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, *rest = verb.split()
    assert cli(name, str(tmp_path), *rest) == SecurityError.exit_code
    assert "pass --trust-remote-code" in capsys.readouterr().err
    assert cli(name, str(tmp_path), *rest, "--trust-remote-code") != 0  # there is no code.py
    assert "pass --trust-remote-code" not in capsys.readouterr().err


def test_what_libraries_print_stays_out_of_the_json(api, cli, capsys, monkeypatch):
    def chatty(*_args: object, **_options: object) -> dict[str, int]:
        print("a library says hello")
        return {"blocks": 3}

    monkeypatch.setattr(api, "inspect", chatty, raising=False)
    assert cli("inspect", "model", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"blocks": 3}
    assert "a library says hello" in captured.err


def test_bench_hands_its_flags_over(cli, monkeypatch):
    asked = {}

    def bench(model, **options):
        asked.update(options, model=model)
        raise ConfigError("enough.")

    monkeypatch.setattr("pocketlm.api.bench", bench)
    assert (
        cli("bench", "out", "--batch", "4", "--prompt", "9", "--new", "7", "--context", "20") == 2
    )
    assert asked == {
        "model": "out",
        "batch": 4,
        "prompt_tokens": 9,
        "new_tokens": 7,
        "context": 20,
        "runs": 3,
        "device": "auto",
        "dtype": None,
        "threads": None,
        "trust_remote_code": False,
    }


def test_roofline_draws_and_writes(cli, capsys, tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaConfig(**sizes, num_attention_heads=4, vocab_size=128).save_pretrained(tmp_path)
    plot = tmp_path / "r.svg"
    assert cli("roofline", str(tmp_path), "--device", "l4", "--plot", str(plot)) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA L4" in shown
    assert "mlp.down_proj" in shown
    assert plot.read_text().startswith("<svg")
    assert cli("roofline", str(tmp_path), "--device", "l4", "--weight-bits", "4.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weight_bits"] == 4.5
    assert cli("roofline", str(tmp_path), "--device", "l5") == 2
    assert "Known: auto, h100" in capsys.readouterr().err
    assert cli("roofline", str(tmp_path), "--device", "l4", "--measure") == 2
    assert "data sheet" in capsys.readouterr().err


def test_verify_hands_the_engine_on_and_fails_by_exit_code(api, cli, capsys):
    from pocketlm.evaluate.verify import Check, VerifyReport

    failed = Check(name="vllm greedy", status="failed", message="other tokens")
    api.answers["verify"] = VerifyReport(path="out", checks=(failed,))
    python = "vllm-env/bin/python"
    given = ("--engine", "vllm", "--engine-python", python, "--tensor-parallel", "2")
    assert cli("verify", "out", "--against", "model", *given, "--json") == 2
    asked, options = api.calls["verify"]
    assert asked == (Path("out"), "model")
    assert (options["engine"], options["engine_python"]) == ("vllm", Path(python))
    assert (options["engine_path"], options["tensor_parallel"]) == (None, 2)
    assert json.loads(capsys.readouterr().out)["checks"][0]["name"] == "vllm greedy"
