"""Packed weights, tiny artifacts and their dense twins, for these tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.formats import compressed_tensors, pocketlm
from pocketlm.formats.compressed_config import holds
from pocketlm.models.names import checkpoint_tensors
from pocketlm.quant.grid import minmax_grid, round_to_grid


def byte_llama(**options: object) -> LlamaForCausalLM:
    """A random Llama over the bytes, and one more id: 256, which ends a text."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257,
        "initializer_range": 0.3, "eos_token_id": 256, "bos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **options})).eval()


def convolutional() -> PreTrainedModel:
    """A random model that keeps other state than keys and values."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_packed(
    rows: int, columns: int, group: int | None, bits: int, symmetric: bool = True
) -> PackedInt:
    """Codes and zero points over their whole range, scales of both signs."""
    draw = torch.Generator().manual_seed(rows + columns + bits)
    half, groups = 1 << (bits - 1), columns // (group or columns)
    codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=draw)
    scale_OG = torch.randn(rows, groups, generator=draw).bfloat16()
    zero_OG = None
    if not symmetric:
        zero_OG = torch.randint(-half, half, (rows, groups), dtype=torch.int8, generator=draw)
    return PackedInt(codes_OI, scale_OG, zero_OG, bits)


def rounded(weight_OI: Tensor, spec: QuantSpec) -> Packed:
    """Round to nearest."""
    if spec.type != "int":
        weight_OI = weight_OI.float()
        return round_to_grid(weight_OI, minmax_grid(weight_OI, spec, torch.float16), spec)
    rows, columns = weight_OI.shape
    x_OGi = weight_OI.float().reshape(rows, -1, spec.group_size or columns)
    if spec.symmetric:
        scale_OG = (x_OGi.abs().amax(-1) / spec.code_max).half()
        zero_OG = torch.zeros_like(scale_OG)
    else:
        low, high = x_OGi.amin(-1).clamp(max=0), x_OGi.amax(-1).clamp(min=0)
        scale_OG = ((high - low) / (spec.code_max - spec.code_min)).half()
        zero_OG = (spec.code_min - low / scale_OG).round().clamp(spec.code_min, spec.code_max)
    codes = (x_OGi / scale_OG.float()[..., None] + zero_OG.float()[..., None]).round()
    codes_OI = codes.clamp(spec.code_min, spec.code_max).to(torch.int8).view(rows, columns)
    return PackedInt(
        codes_OI, scale_OG, None if spec.symmetric else zero_OG.to(torch.int8), spec.bits
    )


def write_twins(
    directory: Path,
    model: PreTrainedModel,
    specs: Mapping[str, QuantSpec],
    transposed: bool = False,
    chat_template: str | None = None,
) -> tuple[Path, Path]:
    """Writes an artifact, and a plain checkpoint of the same decoded weights.

    Args:
        directory: Where to.
        model: The original.
        specs: Checkpoint module path → grid.
        transposed: Whether those weights are [I, O]; they are then written in our own format.
        chat_template: For the tokenizer.

    Returns:
        The two directories.
    """
    own = transposed or not all(holds(spec) for spec in specs.values())
    form = pocketlm if own else compressed_tensors
    stored, dense = {}, {}
    for name, value in checkpoint_tensors(model).items():
        module = name.removesuffix(".weight")
        dense[name] = value.clone().contiguous()
        if module in specs:
            packed = rounded(value.T if transposed else value, specs[module])
            stored |= form.encode(name, packed)
            decoded = packed.dequantize()
            dense[name] = (decoded.T if transposed else decoded).contiguous()
        else:
            stored[name] = dense[name]
    if own:
        section = pocketlm.config_section(specs, [], list(specs) if transposed else [])
    else:
        section = compressed_tensors.config_section(specs, [])
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    paths = directory / "packed", directory / "dense"
    for path, tensors, extra in zip(
        paths, (stored, dense), ({"quantization_config": section}, {}), strict=True
    ):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        byte_tokenizer(chat_template).save_pretrained(path)
    return paths


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, and an end token: most characters of the world span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<end>": 256}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = chat_template
    return tokenizer
