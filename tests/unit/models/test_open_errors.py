"""What cannot be compressed is refused with a reason before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from pocketlm.core.errors import SecurityError, SourceError, UnsupportedModel
from pocketlm.models import open_model


def edit(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def test_missing_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="no existing path"):
        open_model("/nowhere/at/all")
    with pytest.raises(SourceError, match="cannot be reached"):
        open_model("nobody/nothing")
    with pytest.raises(SourceError, match="does not exist"):
        open_model("gone.gguf")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="not a model directory"):
        open_model(file)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        open_model(tmp_path)


def test_encoder_only(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="BertForMaskedLM is no causal"):
        open_model(tmp_path)


def test_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no causal"):
        open_model(tmp_path)


def test_vision_only(tmp_path: Path) -> None:
    text = json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match="no causal"):
        open_model(tmp_path)


def test_unknown_architecture(saved: Callable[..., Path]) -> None:
    directory = edit(saved("llama"), model_type="llama9")
    with pytest.raises(UnsupportedModel, match=re.escape(transformers.__version__)):
        open_model(directory)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_already_quantized(saved: Callable[..., Path], method: str) -> None:
    directory = edit(saved("llama"), quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModel, match=f"already quantized by {method}"):
        open_model(directory)


def test_remote_code(saved: Callable[..., Path]) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    directory = edit(saved("llama"), model_type="x_model", auto_map=auto_map)
    (directory / "configuration_x.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(SecurityError, match="trust-remote-code"):
        open_model(directory)


def test_a_known_class_ignores_the_checkpoints_code(saved: Callable[..., Path]) -> None:
    directory = edit(saved("llama"), auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (directory / "modeling_x.py").write_text("raise SystemExit('foreign code ran')")
    assert len(open_model(directory).block_paths) == 3


def test_nan_is_found_when_its_block_is_loaded(saved: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    directory = saved("llama")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, directory / "model.safetensors")
    model = open_model(directory)
    with model.block(1):
        pass
    with (
        pytest.raises(SourceError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"),
        model.block(2),
    ):
        pass
