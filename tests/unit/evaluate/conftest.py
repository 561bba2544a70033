"""A tiny random Llama as a ModelView, whole in memory: the evaluation needs no real adapter."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pocketlm.calibration.windows import Windows

VOCABULARY, HIDDEN = 97, 32


class WholeModel:
    """The few methods of ModelView that evaluation calls."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model.eval()
        self.block_paths = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
        self.vocabulary = VOCABULARY
        self.context = 64
        self.device = torch.device("cpu")
        self.compute_dtype = torch.float32
        self.blocks_loaded = 0
        self.largest_logits = 0

    def begin(self, tokens_BT):
        hidden = self.model.model.embed_tokens(tokens_BT)
        positions = torch.arange(tokens_BT.shape[1])[None]
        return hidden, self.model.model.rotary_emb(hidden, positions)

    @contextlib.contextmanager
    def block(self, index):
        self.blocks_loaded += 1
        layer = self.model.model.layers[index]
        yield SimpleNamespace(
            forward=lambda hidden, rotary: layer(hidden, position_embeddings=rotary)
        )

    def finish(self, hidden_BTD):
        return self.model.model.norm(hidden_BTD)

    def logits(self, hidden_ND):
        self.largest_logits = max(self.largest_logits, hidden_ND.shape[0])
        return self.model.lm_head(hidden_ND).float()


def tiny_llama(seed: int, noise: float = 0.0) -> LlamaForCausalLM:
    """A random model; `noise` moves its weights a little, as compression would."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
    return model


@pytest.fixture
def original() -> WholeModel:
    """A random model."""
    return WholeModel(tiny_llama(0))


@pytest.fixture
def changed() -> WholeModel:
    """The same with its weights moved."""
    return WholeModel(tiny_llama(0, noise=0.05))


@pytest.fixture
def windows() -> Windows:
    """Twelve windows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (12, 24), generator=generator)
    return Windows(tokens, "random", "0" * 64, bos=False, seed=None, notes=("a note",))
