"""Importing this module teaches transformers to load the format ``pocketlm``.

``AutoModelForCausalLM.from_pretrained`` then takes such an artifact: packed tensors are loaded into
stand-ins for the compressed layers, decoded in the dtype the model is loaded in, and the layers get
their ordinary weights back. The result is a plain, dense transformers model; `pocketlm.load` runs
from packed weights instead.

What transformers 5.23 does with ``compressed-tensors`` 0.20 when asked for ``dtype=float32`` (read
in both sources, confirmed bit for bit in the tests): every floating tensor, scales too, is cast to
the asked dtype while loading; the layers stay packed; a hook on the model's first forward decodes
them all as ``(code - zero).to(scale.dtype) * scale``. Scales of bfloat16, float16 and float32 are
exact in float32, so the weight is the product rounded once in float32:
`PackedInt.dequantize(torch.float32)`. With ``dtype=bfloat16`` it is rounded once in bfloat16.

Asymmetric grids load in these releases only with ``dequantize: true`` in config.json, and with
one grid for the whole model: that route decodes every layer with the first config group. It decodes
in the dtype in which scales are stored and casts afterwards: with scales of 16 bits each weight
carries a relative rounding of 2^-9 (bfloat16) or 2^-12 (float16) that decoding in float32 has not.
(transformers 5.17 with 0.19 loads them on the ordinary route, bit-equal in float32.)

FP8 goes the ordinary route: float8 codes stay float8 until they are decoded, scales are cast to the
asked dtype, the product is rounded once in it. MXFP4, MXFP8 and NVFP4 are decoded to bfloat16
whatever dtype is asked for. MXFP4 and MXFP8 are exact in it (at most four significant bits times a
power of two), NVFP4 weights are rounded to it: 2^-9 relative. In a float32 model such layers cannot
run, so that config.json asks for ``dequantize: true``, which casts them; that route knows one grid.
A mix of them with others (``mixed-precision``) therefore loads in bfloat16 alone, and so does every
model with them in transformers 5.17 and 5.19, which do not know ``dequantize``.

Integer experts are decoded while they are fused, in the dtype in which their scales are stored, and
keep it whatever dtype is asked for: a float32 model then computes its experts in bfloat16. Their
values are exact in float32, to which `load_plain` casts them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pocketlm.core.errors import ArtifactError
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import (
    LowRankSpec,
    SparseSpec,
    SumSpec,
    WeightSpec,
    parse_weight_spec,
)
from pocketlm.formats import inputs as stored_inputs
from pocketlm.formats import pocketlm as own_format
from pocketlm.formats.compressed_config import DECODED_IN_BFLOAT16, STORAGES
from pocketlm.models.config import read_config
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.names import Binding, map_names
from pocketlm.models.shortcut import add_shortcuts, connect_shortcuts
from pocketlm.models.stream import SafetensorsSource


class PocketlmConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an artifact in the format ``pocketlm``.

    Args:
        **section: The keys that `formats.pocketlm.config_section` writes.
    """

    def __init__(self, **section: Any) -> None:
        self.quant_method = own_format.NAME  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version: int = section.get("format_version", own_format.FORMAT_VERSION)
        self.groups: list[dict[str, Any]] = section.get("groups", [])
        self.transposed: list[str] = section.get("transposed", [])
        self.ignore: list[str] = section.get("ignore", [])
        self.shortcuts: dict[str, str] = section.get("shortcuts", {})

    def inputs(self) -> dict[str, ActivationSpec]:
        """Module path, as in the checkpoint → how its inputs are rounded, of those whose are."""
        return {
            module: ActivationSpec.parse(group["inputs"], where="quantization_config")
            for group in self.groups
            if "inputs" in group
            for module in group["modules"]
        }

    def specs(self) -> dict[str, WeightSpec]:
        """Module path, as in the checkpoint → form of the weight."""
        return {
            module: parse_weight_spec(group["weights"], "quantization_config")
            for group in self.groups
            for module in group["modules"]
        }


register_quantization_config(own_format.NAME)(PocketlmConfig)  # a call: as decorator it loses types


class PackedStandIn(nn.Module):
    """Holds a layer's packed tensors while a checkpoint is loaded; it computes nothing.

    Args:
        layer: The dense layer it stands in for, on the meta device.
        spec: In what form its weight is stored.
        transposed: Whether the layer's weight is [I, O].
        inputs: How its inputs are rounded; None: not at all.
    """

    def __init__(
        self, layer: nn.Module, spec: WeightSpec, transposed: bool, inputs: ActivationSpec | None
    ) -> None:
        super().__init__()
        self.dense = [layer]  # in a list, so that its weight is no parameter of the model meanwhile
        self.spec, self.transposed, self.inputs = spec, transposed, inputs
        weight = layer.get_parameter("weight")
        self.dtype = weight.dtype
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        # Integers are decoded in the model's dtype, all else in float32 and rounded at the end.
        values = spec.values if isinstance(spec, SparseSpec) else spec
        self.factors = isinstance(spec, LowRankSpec | SumSpec)
        integers = isinstance(values, QuantSpec) and values.type == "int"
        scale_dtype = weight.dtype if integers else torch.float32
        for role, (shape, dtype) in own_format.parts(spec, (rows, columns), scale_dtype).items():
            if self.factors and dtype.is_floating_point and dtype.itemsize > 1:
                dtype = torch.float32  # both factors and their scales, multiplied in float32
            data = torch.empty(shape, dtype=dtype, device="meta")
            owner, leaf = _owner(self, role)
            owner.register_parameter(leaf, nn.Parameter(data, requires_grad=False))
        for role in stored_inputs.roles(inputs):
            dtype = torch.int8 if role == stored_inputs.ZERO else torch.float32
            data = torch.empty(1, dtype=dtype, device="meta")
            self.register_parameter(role, nn.Parameter(data, requires_grad=False))
        self.bias = layer._parameters.get("bias")  # an embedding has none
        # Models initialise by name before they look what is loaded (GPT-2: `c_proj.weight`).
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def restored(self) -> nn.Module:
        """The dense layer, its weight decoded in the dtype the model is loaded in."""
        tensors = {f"layer.{name}": value.data for name, value in self.named_parameters()}
        weight_OI = own_format.decode(tensors, "layer", self.spec).dequantize(self.dtype)
        layer = self.dense[0]
        weight = weight_OI.T.contiguous() if self.transposed else weight_OI
        layer.register_parameter("weight", nn.Parameter(weight))
        if self.bias is not None:
            layer.register_parameter("bias", self.bias)
        quantizer = stored_inputs.decode(tensors, "layer", self.inputs)
        if quantizer is not None:
            layer.register_forward_pre_hook(
                lambda _, arguments: (quantizer(arguments[0]), *arguments[1:])
            )
        return layer


def _owner(stand_in: nn.Module, role: str) -> tuple[nn.Module, str]:
    """The module that holds a stored tensor, made if need be, and its name there."""
    side, dot, leaf = role.rpartition(".")
    if not dot:
        return stand_in, role
    if not hasattr(stand_in, side):
        stand_in.add_module(side, nn.Module())
    return stand_in.get_submodule(side), leaf


@register_quantizer(own_format.NAME)
class PocketlmQuantizer(HfQuantizer):
    """Loads the format ``pocketlm`` into dense layers; it does not quantize."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Takes the guard off: the quantizer's first sight of the configuration.

        Args:
            config: Of the model that is being loaded.
        """
        for key in own_format.GUARD:
            config.__dict__.pop(key, None)
        return config

    update_tp_plan = update_attn_implementation  # its name up to transformers 5.18

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if not isinstance(config, PocketlmConfig):
            raise ArtifactError(f"{type(config).__name__} is no configuration of pocketlm.")
        if config.format_version != own_format.FORMAT_VERSION:
            raise ArtifactError(
                f"was written in version {config.format_version} of the format pocketlm.",
                remedy="Install a release of pocketlm that reads it.",
            )
        add_shortcuts(model, config.shortcuts)
        modules, inputs = dict(model.named_modules()), config.inputs()
        paths = {
            # A checkpoint may leave out the prefix of the base model (GPT-2's do).
            name: name if name in modules else f"{model.base_model_prefix}.{name}"
            for name in config.specs()
        }
        fused = {name for name, path in paths.items() if path not in modules}
        self._merged = merged_parameters(model, fused, Path(kwargs["checkpoint_files"][0]).parent)
        for name in fused & inputs.keys():
            raise ArtifactError("its inputs are rounded, but it is fused here.", where=name)
        for name, spec in config.specs().items():
            if name in fused:
                continue
            path = paths[name]
            stand_in = PackedStandIn(
                modules[path], spec, name in config.transposed, inputs.get(name)
            )
            model.set_submodule(path, stand_in)
        # A head that shares a packed embedding waits without a weight until that is decoded.
        self._waiting = {
            head: embedding
            for head, embedding in model.all_tied_weights_keys.items()
            if isinstance(model.get_submodule(embedding.rpartition(".")[0]), PackedStandIn)
        }
        for head in self._waiting:
            del model.all_tied_weights_keys[head]
            module = model.get_submodule(head.rpartition(".")[0])
            del module._parameters["weight"]
            module.register_buffer("weight", torch.empty(0), persistent=False)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedStandIn):
                model.set_submodule(path, module.restored())
        connect_shortcuts(model)
        for name, (binding, source) in self._merged.items():
            parameter = model.get_parameter(name)
            parameter.data = binding.convert(source, model).to(parameter.device, parameter.dtype)
        for head, embedding in self._waiting.items():
            module = model.get_submodule(head.rpartition(".")[0])
            del module._buffers["weight"]
            module.register_parameter("weight", model.get_parameter(embedding))
            model.all_tied_weights_keys[head] = embedding
        return model

    def is_serializable(self) -> bool:
        """False: what is in memory is dense, and saving it would claim that it is packed."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True: the loaded layers are ordinary ones."""
        return True


def merged_parameters(
    model: PreTrainedModel, modules: Collection[str], directory: Path
) -> dict[str, tuple[Binding, DecodedSource]]:
    """Parameters that transformers makes of several compressed linears: its fused experts.

    They are filled after loading, and the library is told not to look for them.

    Args:
        model: On the meta device, before anything stands in for its layers.
        modules: Compressed linears of the checkpoint that are no modules of the model.
        directory: The artifact.

    Returns:
        Parameter → how it is made, and of what.

    Raises:
        ArtifactError: If a linear is part of no parameter.
    """
    if not modules:
        return {}
    with torch.device("cpu"):  # a model is made where everything else would be on the meta device
        source = DecodedSource.wrap(SafetensorsSource(directory), read_config(directory))
    if source is None:
        raise ArtifactError(
            "says that layers are compressed, and holds none.", where=str(directory)
        )
    wanted = {f"{module}.weight" for module in modules}
    found = {
        name: (binding, source)
        for name, binding in map_names(model, source.infos(), str(directory)).bindings.items()
        if wanted & set(binding.tensors)
    }
    lost = wanted - {tensor for binding, _ in found.values() for tensor in binding.tensors}
    if lost:
        raise ArtifactError("is no layer of the model.", where=min(lost))
    owners = {name.rpartition(".")[0] for name in found}  # as transformers renames their parts
    ignored = {
        "missing": [f"^{re.escape(name)}$" for name in sorted(found)],
        "unexpected": [rf"^{re.escape(owner)}\.\d+\." for owner in sorted(owners)],
    }
    for kind, patterns in ignored.items():
        attribute = f"_keys_to_ignore_on_load_{kind}"
        setattr(model, attribute, {*(getattr(model, attribute, None) or ()), *patterns})
    return found


def load_plain(path: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An artifact as plain transformers loads it.

    Where the library leaves 16-bit layers in a float32 model (see above), they are cast; those it
    would decode at the first forward are decoded by it at once.

    Args:
        path: The artifact, or any directory that transformers loads.
        dtype: What it computes in.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    config = json.loads((Path(path) / "config.json").read_text("utf-8"))
    section = config.get("quantization_config", {})
    if dtype == torch.float32 and _has_bfloat16_layers(model, section):
        _decode_to_float32(model)
    if dtype == torch.float32:
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    return model.eval()


def plain_logits(path: Path | str, tokens: Sequence[int]) -> Tensor:
    """float32 logits of one sequence as plain transformers computes them from an artifact.

    Args:
        path: The artifact.
        tokens: Token ids.

    Returns:
        float32 [T, V], on the CPU.
    """
    with torch.no_grad():
        return load_plain(path)(torch.tensor([tokens]), use_cache=False).logits[0].float()


def _has_bfloat16_layers(model: nn.Module, section: Mapping[str, Any]) -> bool:
    """Whether the library decodes any layer to bfloat16, now or at the first forward."""
    storages = {group.get("format") for group in section.get("config_groups", {}).values()}
    apart = any(hasattr(module, "quantization_scheme") for module in model.modules())
    return apart and not storages.isdisjoint(STORAGES[name] for name in DECODED_IN_BFLOAT16)


def _decode_to_float32(model: nn.Module) -> None:
    """Decodes every layer by the library now, instead of at the first forward, and casts it."""
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    model._forward_pre_hooks.clear()  # the library's, which would decode a second time
    for module in model.modules():
        if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED:
            decompress_module(module)
    nn.Module.float(model)  # transformers' own method refuses a model that was quantized once


def main(arguments: Sequence[str]) -> None:
    """``python -m pocketlm.hf ARTIFACT OUT TOKEN...`` writes the raw logits into OUT.

    `verify` runs this as a process of its own: what it compares with shares nothing with it.
    """
    path, out, *tokens = arguments
    logits_TV = plain_logits(path, [int(token) for token in tokens])
    Path(out).write_bytes(logits_TV.contiguous().numpy().tobytes())


if __name__ == "__main__":
    main(sys.argv[1:])
