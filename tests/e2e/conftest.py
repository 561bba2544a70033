"""A tiny random model with a tokenizer, on disk, and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUICK = ("--samples", "4", "--seq-len", "32", "--group-size", "32", "--device", "cpu")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process: everything is real but the import of torch."""
    from pocketlm.cli.main import run

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def process() -> Callable[..., subprocess.Popen[str]]:
    """Starts a command in a process of its own."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pocketlm.cli.main", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return start


def save_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are bytes: it needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: at + 1 for at, letter in enumerate(alphabet)}}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>").save_pretrained(path)


def save_model(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(torch.bfloat16)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody writes to."""
    return save_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model to spoil."""
    return save_model(tmp_path / "model")


@pytest.fixture(scope="session")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model compressed; nobody writes to it."""
    from pocketlm.cli.main import run

    path = tmp_path_factory.mktemp("artifact") / "out"
    assert run(["compress", str(source), "-o", str(path), "--quiet", *QUICK]) == 0
    return path
