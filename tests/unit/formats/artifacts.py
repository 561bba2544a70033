"""Tiny artifacts, written through formats only: RTN of random models, no engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.formats import format_for
from pocketlm.formats.pocketlm import GUARD
from pocketlm.formats.shards import Entry, assemble, write_file
from pocketlm.quant.grid import minmax_grid, round_to_grid

Artifact = tuple[Path, dict[str, Packed]]  # the directory, and what was written by module


def round_to_nearest(
    weight_OI: Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.float32
) -> Packed:
    """Codes of a weight; integer groups alternate in the sign of their scale, as methods may."""
    if spec.type != "int":
        weight_OI = weight_OI.float()
        return round_to_grid(weight_OI, minmax_grid(weight_OI, spec, scale_dtype), spec)
    rows, columns = weight_OI.shape
    groups = columns // (spec.group_size or columns)
    weight_OGi = weight_OI.float().view(rows, groups, -1)
    zero_OG = None
    if spec.symmetric:
        scale_OG = weight_OGi.abs().amax(-1) / -spec.code_min
        scale_OG[:, ::2] *= -1
    else:
        low, high = weight_OGi.amin(-1).clamp(max=0), weight_OGi.amax(-1).clamp(min=0)
        scale_OG = (high - low) / (spec.code_max - spec.code_min)
        zero_OG = torch.round(spec.code_min - low / scale_OG).to(torch.int8)
    scale_OG = scale_OG.to(scale_dtype)
    codes_OGi = torch.round(weight_OGi / scale_OG.float()[:, :, None])
    if zero_OG is not None:
        codes_OGi += zero_OG[:, :, None]
    codes_OI = codes_OGi.clamp(spec.code_min, spec.code_max).to(torch.int8).view(rows, columns)
    return PackedInt(codes_OI, scale_OG, zero_OG, spec.bits)


def entry(name: str, tensor: Tensor) -> Entry:
    """A tensor as something to be written."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()

    def chunks() -> Iterator[memoryview]:
        for start in range(0, len(data), 1000):
            yield memoryview(data[start : start + 1000])

    return Entry(name, tensor.dtype, tuple(tensor.shape), chunks)


def write_artifact(
    directory: Path,
    model: transformers.PreTrainedModel,
    choose: Callable[[str], QuantSpec | None],
    form: str = "compressed-tensors",
    max_shard_bytes: float = 5e9,
) -> Artifact:
    """Writes a model with its block linears rounded to nearest.

    Args:
        directory: Where to.
        model: A random model.
        choose: Module path → grid, or None to keep it.
        form: Name of the format.
        max_shard_bytes: As in `assemble`.
    """
    writer = format_for(form)
    stored: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    specs: dict[str, QuantSpec] = {}
    accounts: dict[str, Mapping[str, object]] = {}
    ignored: list[str] = []
    transposed: list[str] = []
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        module, _, leaf = name.rpartition(".")
        layer = model.get_submodule(module)
        linear = leaf == "weight" and isinstance(layer, torch.nn.Linear | Conv1D)
        spec = choose(module) if linear and module != "lm_head" else None
        outputs = [name]
        if spec is None:
            stored[name] = tensor
            ignored += [module] if linear else []
            bits = 8 * tensor.numel() * tensor.element_size()
        else:
            weight_OI = tensor.T if isinstance(layer, Conv1D) else tensor
            transposed += [module] if isinstance(layer, Conv1D) else []
            packed[module] = round_to_nearest(weight_OI, spec, tensor.dtype)
            specs[module] = spec
            encoded = writer.encode(name, packed[module])
            stored |= encoded
            outputs = list(encoded)
            bits = packed[module].stored_bits
        accounts[name] = {
            "action": "kept" if spec is None else "quantized",
            "reason": "because",
            "shape": tuple(tensor.shape),
            "bits": bits,
            "spec": None if spec is None else spec.model_dump(),
            "notes": [],
            "outputs": outputs,
            "error": None,
        }
    entries = [entry(name, tensor) for name, tensor in stored.items()]
    digests = assemble(directory, entries, max_shard_bytes)
    config = json.loads(model.config.to_json_string(use_diff=False))
    extra = (transposed,) if form == "pocketlm" else ()
    config["quantization_config"] = writer.config_section(specs, ignored, *extra)
    config |= GUARD if form == "pocketlm" else {}
    (directory / "pocketlm").mkdir()
    for name, text in (
        ("pocketlm/recipe.yaml", "steps: [rtn]\n"),
        ("config.json", json.dumps(config)),
    ):
        digests[name] = write_file(directory / name, text.encode())
    ledger = {
        "source": "random",
        "format": form,
        "fingerprint": {},
        "tensors": accounts,
        "files": digests,
    }
    (directory / "pocketlm" / "ledger.json").write_text(json.dumps(ledger))
    return directory, packed


def build_llama(
    dtype: torch.dtype = torch.float32, tied: bool = False
) -> transformers.LlamaForCausalLM:
    """A random Llama of two blocks."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return decoded_by_hand(model, {}, dtype)


def build_gpt2() -> transformers.GPT2LMHeadModel:
    """A random GPT-2 of two blocks; its linears are Conv1D."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def decoded_by_hand(
    model: transformers.PreTrainedModel,
    packed: Mapping[str, Packed],
    dtype: torch.dtype = torch.float32,
) -> transformers.PreTrainedModel:
    """The model with the decoded weights put in place, in `dtype`."""
    for parameter in model.parameters():  # not buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for module, weight in packed.items():
            layer = model.get_submodule(module)
            weight_OI = weight.dequantize(dtype)
            layer.weight.copy_(weight_OI.T if isinstance(layer, Conv1D) else weight_OI)
    return model
