"""Builds a model to run: transformers' own classes, weights read one tensor at a time.

Linears that an artifact holds compressed are replaced by what the caller makes of their codes, and
are never decoded here. Fused experts become a module per expert where the artifact compresses
them. Everything else is loaded as it is stored, in the dtype the model computes in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import UnsupportedLayer, UnsupportedModel
from pocketlm.core.tensors import WeightTensor
from pocketlm.core.views import TensorSource
from pocketlm.formats import kv_cache
from pocketlm.formats.pocketlm import shortcuts_of
from pocketlm.formats.read import CompressedIndex
from pocketlm.models.config import judge_config, read_config, transformers_config
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.experts import split_experts
from pocketlm.models.linear import is_linear, linear_shape
from pocketlm.models.load import Loader
from pocketlm.models.names import NameMap, map_names, settle_ties
from pocketlm.models.opening import open_model
from pocketlm.models.shortcut import add_shortcuts, connect_shortcuts
from pocketlm.models.skeleton import build_skeleton
from pocketlm.models.stream import SafetensorsSource
from pocketlm.models.tokenizer import load_tokenizer, side_files

log = logging.getLogger("pocketlm.models")
MakeLinear = Callable[[WeightTensor, Tensor | None, InputQuantizer | None], nn.Module]
MakeEmbedding = Callable[[WeightTensor, nn.Embedding], nn.Module]


def runtime_model(
    path: Path,
    make_linear: MakeLinear,
    make_embedding: MakeEmbedding,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a compressed artifact, or any source that `open_model` reads, ready for `generate`.

    Args:
        path: A directory or a `.gguf` file.
        make_linear: Makes the module for a weight [O, I], a bias [O] or None, and what rounds the
            inputs or None; all on the CPU.
        make_embedding: Makes the module for codes [V, D] and the embedding it stands for.
        device: Where the model lies.
        dtype: What it computes in.
        trust_remote_code: Whether code from the checkpoint may run.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        SourceError: If the model cannot be read.
        ArtifactError: If its compressed tensors contradict its configuration.
        UnsupportedModel: If it is quantized in a way that is not read here.
    """
    if is_compressed(path):
        make = (make_linear, make_embedding)
        return _packed_model(path, make, device, dtype, trust_remote_code)
    view = open_model(path, device=device, compute_dtype=dtype, trust_remote_code=trust_remote_code)
    # Built again without the split of experts that views need: fused ones run faster.
    config = view.skeleton.model.config
    model = build_skeleton(config, dtype, trust_remote_code=trust_remote_code).model
    names = settle_ties(model, map_names(model, view.source.infos(), str(path)), view.source)
    _finish(model, view.source, names, device, dtype, view.side_files())
    return model, view.tokenizer()


def is_compressed(path: Path) -> bool:
    """Whether a path is a directory whose config.json has a `quantization_config`."""
    return path.is_dir() and "quantization_config" in read_config(path)


def _packed_model(
    directory: Path,
    make: tuple[MakeLinear, MakeEmbedding],
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config, where = read_config(directory), str(directory)
    judge_config(config, where, trust_remote_code=trust_remote_code, allow_compressed=True)
    if kv_cache.scheme_of(config) is not None:
        log.warning("the file asks engines to round the cache of keys and values; it is not here")
    stored = SafetensorsSource(directory)
    index = CompressedIndex.build(config, stored.infos())
    if index is None:
        raise UnsupportedModel("its quantization_config is empty.", where=where)
    source = DecodedSource(stored, index)  # original names; nothing compressed is read through it
    hf_config = transformers_config(directory, trust_remote_code=trust_remote_code)
    hf_config.__dict__.pop("quantization_config", None)
    skeleton = build_skeleton(hf_config, dtype, trust_remote_code=trust_remote_code)
    add_shortcuts(skeleton.model, shortcuts_of(config))
    names = map_names(skeleton.model, source.infos(), where)
    source.require_biases(names.extras, where)
    names = settle_ties(skeleton.model, names, source)
    names, fused = split_experts(skeleton, names)
    for path, reason in fused.items():
        _require_uncompressed(path, reason, names, index)
    for parameter, binding in names.bindings.items():
        module = binding.tensors[0].removesuffix(".weight")
        if module not in index.modules:
            continue
        path = parameter.removesuffix(".weight")
        if not binding.plain or path == parameter:
            raise UnsupportedLayer(
                "is compressed, but this version of transformers merges it with others.",
                where=parameter,
            )
        packed, old = index.decode(module, stored.read), skeleton.model.get_submodule(path)
        if isinstance(old, nn.Embedding):
            skeleton.model.set_submodule(path, make[1](packed, old))
            continue
        bias, quantizer = _bias(path, stored, names), index.quantizer(module, stored.read)
        _replace(skeleton.model, path, packed, bias, quantizer, make[0])
    connect_shortcuts(skeleton.model)
    _finish(skeleton.model, source, names, device, dtype, side_files(directory))
    stored.close()
    return skeleton.model, load_tokenizer(directory, trust_remote_code=trust_remote_code)


def _require_uncompressed(path: str, reason: str, names: NameMap, index: CompressedIndex) -> None:
    """Fused experts may only stay fused where nothing of them is compressed."""
    for parameter, binding in names.bindings.items():
        if not parameter.startswith(f"{path}."):
            continue
        for tensor in binding.tensors:
            if tensor.removesuffix(".weight") in index.modules:
                raise UnsupportedLayer(f"holds compressed experts, but {reason}.", where=path)


def _bias(path: str, source: TensorSource, names: NameMap) -> Tensor | None:
    binding = names.bindings.get(f"{path}.bias")
    return None if binding is None else source.read(binding.tensors[0])


def _replace(
    model: PreTrainedModel,
    path: str,
    packed: WeightTensor,
    bias: Tensor | None,
    quantizer: InputQuantizer | None,
    make_linear: MakeLinear,
) -> None:
    old = model.get_submodule(path)
    if not is_linear(old):
        raise UnsupportedLayer(f"is compressed, but a {type(old).__name__}.", where=path)
    if linear_shape(old) != packed.shape:
        raise UnsupportedLayer(
            f"is stored as {packed.shape}, the model wants {linear_shape(old)}.",
            where=path,
        )
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, make_linear(packed, bias, quantizer))


def _finish(
    model: PreTrainedModel,
    source: TensorSource,
    names: NameMap,
    device: torch.device,
    dtype: torch.dtype,
    files: Mapping[str, bytes],
) -> None:
    """Loads what is still on the meta device, ties, and takes over the generation defaults."""
    loader = Loader(source, names, model, device, dtype)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in names.bindings:
            buffer = names.bindings[name].convert(source, model).to(buffer.dtype)
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            loaded = nn.Parameter(loader.read(name, parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, loaded)
    _tie(model)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise UnsupportedModel("no weight was found for this parameter.", where=left[0])
    if "generation_config.json" in files:
        defaults = json.loads(files["generation_config.json"])
        model.generation_config = GenerationConfig.from_dict(defaults)
    model.eval()


def _tie(model: PreTrainedModel) -> None:
    """Ties parameters; what shares a packed weight holds it in a layout of its own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    packed = [t for t, s in model.all_tied_weights_keys.items() if s not in parameters]
    for name in packed:
        del model.all_tied_weights_keys[name]
    model.tie_weights(recompute_mapping=not packed)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of keys and values that fits the model's layers."""
    return DynamicCache(config=model.config)


def cut_cache(cache: Cache, length: int) -> bool:
    """Shortens a cache to its first `length` positions.

    Returns:
        Whether that was possible; layers with a sliding window have dropped what they would need.
    """
    held = cache.get_seq_length()
    if held == length:
        return True
    if held < length or length == 0 or any(cache.is_sliding):
        return False
    cache.crop(length - held)  # negative: how many positions to drop
    return True
