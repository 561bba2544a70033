"""The evaluation through the streaming adapter, from files: the same figures as transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from pocketlm.calibration.windows import Windows
from pocketlm.evaluate import hidden
from pocketlm.evaluate.quality import evaluate_model
from pocketlm.models import open_model

SHAPE = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "qwen3": Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **SHAPE,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SHAPE),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_perplexity_equals_transformers_loss(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "BATCH_TOKENS", 64)  # batches of two windows, the last of one
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 120, (5, 32), generator=torch.Generator().manual_seed(1))
    windows = Windows(tokens, "random", "0" * 64, bos=False, seed=None)
    view = open_model(tmp_path)
    report = evaluate_model(view, windows, view)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    assert report.window_losses == pytest.approx(losses, abs=1e-5)
    assert report.divergence is not None
    assert report.divergence.kl_mean.value < 1e-6
