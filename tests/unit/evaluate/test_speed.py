"""Speed of a tiny model on disk, in this process and in a child; bytes that a token reads."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pocketlm.core.errors import ConfigError, ResourceError
from pocketlm.evaluate import hardware
from pocketlm.evaluate.hardware import copy_bandwidth, weight_bytes_per_token
from pocketlm.evaluate.results import SpeedReport
from pocketlm.evaluate.speed import measure_here, measure_speed


def tiny(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=7,
        )
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, saved."""
    path = tmp_path_factory.mktemp("tiny")
    tiny(tied=False).save_pretrained(path)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return path


def test_figures_fit_together(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "COPY_BYTES", 8 << 20)
    report = measure_here(directory, prompt_tokens=16, new_tokens=8, runs=3, dtype="float32")
    assert len(report.decode_runs) == 3
    assert report.decode_tokens_per_second == sorted(report.decode_runs)[1]
    assert report.prefill_tokens_per_second > 0
    cache = (
        2 * 2 * 2 * 8 * (16 + 4) * 4
    )  # layers, keys and values, heads, width, mean length, bytes
    assert report.cache_bytes_per_step == cache
    bytes_per_second = (report.weight_bytes_per_token + cache) * report.decode_tokens_per_second
    assert report.achieved_bytes_per_second == pytest.approx(bytes_per_second)
    assert report.token_seconds_p50 <= report.token_seconds_p99
    assert report.first_token_seconds == pytest.approx(16 / report.prefill_tokens_per_second)
    assert report.loop == "the step in C over a static cache" or "lean" in report.loop
    assert report.peak_memory_bytes is None or report.peak_memory_bytes > 50e6
    assert report.dtype == "float32"
    assert "16 tokens, 8 new ones" in report.sentence()
    assert SpeedReport.model_validate_json(report.model_dump_json()) == report


def test_a_child_measures(directory: Path) -> None:
    report = measure_speed(
        directory, prompt_tokens=16, new_tokens=4, runs=1, threads=1, batch=3, context=40,
        trust_remote_code=True,
    )  # fmt: skip
    assert (report.prompt_tokens, report.new_tokens, report.runs) == (16, 4, 1)
    assert (report.batch, report.context) == (3, 40)
    assert report.hardware.endswith(" 1 threads")


@pytest.mark.slow  # two processes that import torch
def test_a_child_ends_with_a_parent_that_is_killed(directory: Path) -> None:
    call = f"measure_speed({str(directory)!r}, runs=10**9)"
    work = f"from pocketlm.evaluate.speed import measure_speed; {call}"
    parent = subprocess.Popen([sys.executable, "-c", work])
    until = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()):
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert len(gone) == 1
    assert not alive


@pytest.mark.parametrize(
    ("code", "stderr", "message"),
    [
        (-9, "", r"ended with -9 \(signal 9\): no message"),
        (2, "noise\nout: is no existing path.", "ended with 2: out: is no existing path"),
        (0, "", "ended with 0"),  # without a result
    ],
)
def test_a_childs_end_is_told(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, message: str
) -> None:
    def run(command, **options):
        assert command[-2:] == ["--runs", "1"]
        return subprocess.CompletedProcess(command, code, stdout="noise", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ResourceError, match=message):
        measure_speed("out", runs=1, threads=None)


def test_an_error_of_a_child_arrives_as_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_speed(tmp_path, new_tokens=1)
    assert caught.value.where == "speed"
    assert caught.value.remedy == "Ask for at least 1, 2, 1 and 1."


def test_senseless_counts_are_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        measure_here(directory, new_tokens=1)
    with pytest.raises(ConfigError, match="unknown dtype 'float8'"):
        measure_here(directory, dtype="float8")


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_no_head_is_read_by_row(tied: bool) -> None:
    model = tiny(tied)
    blocks = sum(p.nbytes for n, p in model.named_parameters() if "layers" in n or "norm" in n)
    head = 256 * 32 * 4
    rows = 0 if tied else 32 * 4
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    counted, notes = weight_bytes_per_token(model)
    # the rotary table stands in two buffers that share memory or not: both are right
    assert blocks + head + rows <= counted <= blocks + head + rows + buffers
    assert notes == ()


def test_bandwidth_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "COPY_BYTES", 8 << 20)
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13
