"""Tiny models as streams of blocks, and a batch of random text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pocketlm.calibration.windows import Windows
from pocketlm.core.spec import Recipe
from pocketlm.models import open_model
from pocketlm.models.adapter import Model

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(llama: Path) -> Model:
    return open_model(llama)


@pytest.fixture(scope="session")
def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    tokens_NT = torch.randint(0, 97, (3, 16), generator=generator)
    return Windows(tokens_NT, "random", "0" * 64, bos=False, seed=1)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.parse(
        {"steps": ["clip", "rtn"], "weights": {"bits": 4, "group_size": 32}, "ignore": ["lm_head"]}
    )
