"""The main job on a tiny model through the command line: each verb, drawn and as JSON; two runs at
once, Ctrl-C, a full disk, a tampered artifact.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.conftest import QUICK, Done, save_model

Cli = Callable[..., Done]
Start = Callable[..., "subprocess.Popen[str]"]
EVAL = ("--seq-len", "64", "--limit", "3", "--device", "cpu")


def test_plan_and_outcome_agree_on_bytes(cli: Cli, source, tmp_path):
    planned = cli("plan", source, "--json", *QUICK).json
    made = cli("compress", source, "-o", tmp_path / "out", "--json", *QUICK).json
    assert made["bits_per_weight"] == pytest.approx(planned["bits_per_weight"])
    assert made["output_bytes"] == pytest.approx(planned["output_bytes"], rel=0.02)
    assert not (tmp_path / "out.pocketlm-work").exists()


def test_plan_tells_of_the_calibration_text(cli: Cli, source):
    planned = cli("plan", source, "--json", *QUICK).json
    assert planned["text"]["tokens"] == 4 * 32
    assert planned["tokens_per_expert"] is None
    assert "0 duplicate windows" in cli("plan", source, *QUICK).out.replace("\n", " ")


def test_what_is_not_as_asked_is_told_by_the_plan_and_the_run(cli: Cli, source, tmp_path):
    many = ("--samples", "100000", "--seq-len", "64")
    warnings = cli("plan", source, *many, "--json").json["warnings"]
    assert any("not 100000" in said for said in warnings)
    unused = ("--method", "rtn", "--calibration", "self")
    (said,) = cli("plan", source, *unused, "--json").json["warnings"]
    assert "change nothing" in said
    done = cli("compress", source, "-o", tmp_path / "out", *unused, "--json")
    assert said in done.json["warnings"]


def test_a_second_call_finds_it_done(cli: Cli, source, tmp_path):
    output = tmp_path / "out"
    assert cli("compress", source, "-o", output, "--json", *QUICK).json["already_done"] is False
    assert cli("compress", source, "-o", output, "--json", *QUICK).json["already_done"] is True


def test_a_person_reads_prediction_and_outcome(cli: Cli, source, tmp_path):
    done = cli("compress", source, "-o", tmp_path / "out", *QUICK)
    assert done.code == 0
    for words in ("Wrote", "predicted", "came out", "bits per weight", "pocketlm verify"):
        assert words in done.out
    assert "inputs of the linears: 128 tokens or more, effective rank" in done.out
    assert "block 2 of 2" in done.err


def test_inspect(cli: Cli, source):
    found = cli("inspect", source, "--json").json
    assert found["blocks"] == 2
    shown = cli("inspect", source).out
    assert "self_attn.q_proj 64×64, self_attn.k_proj 32×64" in shown
    assert "input_layernorm" in shown


def test_verify_passes(cli: Cli, artifact, source):
    """Here transformers runs in a process of its own, which knows nothing of this one."""
    done = cli("verify", artifact, "--against", source)
    assert done.code == 0, done.out
    assert "Verified" in done.out
    assert "bit-equal to transformers" in done.out.replace("\n", " ")


@pytest.mark.usefixtures("in_process")
def test_verify_fails_loudly(cli: Cli, artifact, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(artifact, spoilt)
    data = bytearray((spoilt / "model.safetensors").read_bytes())
    data[-40] ^= 1
    (spoilt / "model.safetensors").write_bytes(data)
    done = cli("verify", spoilt)
    assert done.code == 2
    assert "✗" in done.out
    assert "checks failed" in done.err
    assert "Traceback" not in done.err


def test_eval_and_report(cli: Cli, artifact, source, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(artifact, mine)
    done = cli("eval", mine, "--against", source, "--no-speed", "--prompt", "a", *EVAL)
    assert done.code == 0, done.err
    for words in (
        "before", "after", "Weights on disk", "Perplexity", "KL to", "99 % of tokens below",
        "Same top token", "worst tokens: after",
    ):  # fmt: skip
        assert words in done.out
    found = cli("report", mine, "--json").json
    assert Path(found["page"]).read_text("utf-8").startswith("<!doctype html>")
    assert found["metrics"]["quality"]["divergence"]["top1_agreement"]["value"] > 0.5
    assert "Perplexity" in cli("report", mine).out


def test_eval_on_the_calibration_text_is_told(cli: Cli, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says {i * 7919 % 1009}.\n" for i in range(400)), "utf-8")
    part = tmp_path / "part.txt"
    part.write_text(text.read_text("utf-8")[300:], "utf-8")
    output = tmp_path / "out"
    flags = ("--calibration", text, *QUICK, "--samples", "100", "--seq-len", "128")
    assert cli("compress", source, "-o", output, *flags).code == 0
    for file, said in ((text, "is the calibration text"), (part, "the figures flatter")):
        arguments = ("eval", output, "--against", source, "--no-speed", "--text", file, *EVAL)
        found = cli(*arguments, "--json").json
        assert said in " ".join(found["quality"]["notes"])
        assert said in cli(*arguments).out.replace("\n", " ")
        assert said in Path(found["report"]).read_text("utf-8")
        assert said in (output / "README.md").read_text("utf-8")
    found = cli("eval", output, "--no-speed", "--json", *EVAL).json
    assert not found["quality"]["notes"]


def test_gates_set_the_exit_code(cli: Cli, artifact, source):
    arguments = ("eval", artifact, "--against", source, "--no-speed", *EVAL)
    done = cli(*arguments, "--gate", "kl<9", "--gate", "top1>0.01", "--json")
    assert (done.code, [gate["verdict"] for gate in done.json["gates"]]) == (0, ["pass", "pass"])
    kl = done.json["quality"]["divergence"]["kl_mean"]
    undecided = cli(*arguments, "--gate", f"kl<{kl['value']}")
    assert undecided.code == 5
    failed = cli(*arguments, "--gate", f"kl<{kl['value']}", "--gate", f"kl<{kl['low'] / 2}")
    assert failed.code == 4
    assert "its lower end" in failed.err
    assert "KL to" in failed.out
    assert cli("eval", source, "--gate", "kl<1", *EVAL).code == 2


def test_bisect_names_what_hurts_and_writes_a_recipe(cli: Cli, artifact, source, tmp_path):
    text = ("--seq-len", "64", "--limit", "3", "--device", "cpu", "--cache-dir", tmp_path / "kls")
    arguments = ("bisect", artifact, "--against", source, "--worst", "2", *text)
    done = cli(*arguments, "-o", tmp_path / "better.yaml", "--json")
    assert done.code == 0, done.err
    found = done.json
    evaluated = cli("eval", artifact, "--against", source, "--no-speed", "--json", *EVAL).json
    kl = evaluated["quality"]["divergence"]["kl_mean"]["value"]
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["kl_all_restored"] < kl / 100
    first, second = found["culprits"]
    assert first["gain"] >= second["gain"] > 0
    assert kl > first["kl_left"] > second["kl_left"]
    assert first["bytes_kept"] > 3 * first["bytes_now"]
    quick = cli(*arguments, "--json").json
    assert [c["name"] for c in quick["culprits"]] == [first["name"], second["name"]]
    assert first["name"] in cli(*arguments).out
    output = tmp_path / "better"
    assert cli("compress", source, "-o", output, "--recipe", tmp_path / "better.yaml",
               *QUICK[:4], "--device", "cpu").code == 0  # fmt: skip
    ledger = json.loads((output / "pocketlm" / "ledger.json").read_text("utf-8"))
    for name in (*first["linears"], *second["linears"]):
        assert ledger["tensors"][f"{name}.weight"]["action"] == "kept"
    refused = cli("bisect", source, "--against", source, *text)
    assert refused.code == 2
    assert "no compressed linear" in refused.err


def test_eval_of_an_original_alone(cli: Cli, source):
    found = cli("eval", source, "--no-speed", "--json", *EVAL).json
    assert found["quality"]["perplexity"] > 1
    assert found["quality"]["divergence"] is None
    assert "perplexity" in cli("eval", source, "--no-speed", *EVAL).out


def test_compare(cli: Cli, artifact, source, tmp_path):
    plot = tmp_path / "pareto.svg"
    done = cli("compare", source, artifact, artifact, *EVAL, "--plot", plot)
    assert done.code == 0, done.err
    assert "loss over the original" in done.out
    assert "weights on disk" in done.out
    assert plot.read_text("utf-8").count("<circle") == 2
    assert len(cli("compare", source, artifact, "--json", *EVAL).json) == 1


def test_compare_runs_the_original_once(cli: Cli, artifact, source, monkeypatch):
    from pocketlm.evaluate import hidden

    streamed = []
    real = hidden.stream

    def spy(model, *arguments):
        streamed.append(model)
        return real(model, *arguments)

    monkeypatch.setattr(hidden, "stream", spy)
    one = cli("eval", artifact, "--against", source, "--no-speed", "--json", *EVAL).json
    streamed.clear()
    two = cli("compare", source, artifact, artifact, "--json", *EVAL).json
    assert len(streamed) == 3
    for found in two:
        assert found["quality"]["divergence"] == one["quality"]["divergence"]


def test_compare_refuses_models_of_different_tokens(cli: Cli, source, tmp_path):
    other = save_model(tmp_path / "other", vocab_size=320)
    done = cli("compare", source, other, "--json", *EVAL)
    assert (done.code, done.json["error"]["type"]) == (2, "ConfigError")
    assert "320 tokens" in done.json["error"]["what"]
    reordered = save_model(tmp_path / "reordered")
    path = reordered / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), "utf-8")
    done = cli("compare", source, source, reordered, "--json", *EVAL)
    assert "other tokens" in done.json["error"]["what"]


def test_generate_is_greedy_and_streams_what_it_returns(cli: Cli, artifact):
    arguments = ("generate", artifact, "-p", "Hello", "--max-new-tokens", "6", "--device", "cpu")
    first, again = cli(*arguments, "--json").json, cli(*arguments, "--json").json
    assert first["tokens"] == again["tokens"]
    assert 1 <= len(first["tokens"]) <= 6
    assert cli(*arguments).code == 0


def test_chat_reads_lines(cli: Cli, artifact, monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("Hello\n\nAgain\n/quit\nNever\n", "utf-8")
    with (tmp_path / "lines").open(encoding="utf-8") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        said = cli("chat", artifact, "--json", "--max-new-tokens", "3", "--device", "cpu").json
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"] * 2
    assert said["messages"][2]["content"] == "Again"


def test_methods_and_doctor(cli: Cli):
    methods = {m["name"]: m for m in cli("methods", "--json").json["methods"]}
    assert methods["gptq"]["needs"] == ["Hessian"]
    assert "damping" in methods["gptq"]["options"]
    assert "gptq" in cli("methods").out
    assert cli("doctor", "--json").json["kernels"]
    assert "kernel" in cli("doctor").out


def test_a_full_disk_leaves_nothing_that_looks_whole(cli: Cli, source, tmp_path, monkeypatch):
    real, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    output = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    done = cli("compress", source, "-o", output, "--json", *QUICK)
    assert done.code == 3
    assert done.json["error"]["type"] == "ResourceError"
    assert "disk" in done.json["error"]["what"]
    assert not (output / "config.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert cli("compress", source, "-o", output, *QUICK).code == 0
    assert (output / "config.json").exists()


def wait_for_block(process: subprocess.Popen[str], work: Path) -> None:
    """Until the first block lies in the work directory."""
    until = time.monotonic() + 60
    while not list((work / "blocks").glob("*.json")) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_second_run_and_ctrl_c(process: Start, cli: Cli, tmp_path):
    """Another run on the same output is refused and harms nothing; Ctrl-C leaves a state to go on
    from. One process shows both: it takes seconds to start.
    """
    model = save_model(tmp_path / "model", num_hidden_layers=12)
    output, work = tmp_path / "out", tmp_path / "out.pocketlm-work"
    asked = ("compress", model, "-o", output, "--method", "rtn", *QUICK)
    running = process(*asked)
    try:
        wait_for_block(running, work)
        running.send_signal(signal.SIGSTOP)
        blocks = len(list((work / "blocks").glob("*.json")))
        assert 0 < blocks < 12
        done = cli(*asked, "--json")
        assert done.code == 2
        assert done.json["error"]["type"] == "OutputBusy"
        assert "another run" in done.json["error"]["what"]
        running.send_signal(signal.SIGINT)  # it waits until the process goes on
    finally:
        running.send_signal(signal.SIGCONT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, (out, err)
    assert "run the same command to go on" in err
    assert not (output / "config.json").exists()
    done = cli(*asked)
    assert done.code == 0, done.err
    assert (output / "config.json").exists()
    assert "block 12 of 12" in done.err
    assert "\nblock 1 of 12" not in done.err  # it is not done again
