"""Finds the compressed linears of an artifact and decodes them one at a time.

Works on the ``quantization_config`` of config.json and the names of the stored tensors alone. Reads
what this package writes, and what other tools do: files of llm-compressor and compressed-tensors
with the same storages, of GPTQ in both conventions, of AWQ in the version gemm, of AutoRound.
Anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, UnsupportedModel, nearest
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import WeightSpec, parse_weight_spec
from pocketlm.core.tensors import WeightTensor
from pocketlm.formats import auto_round, awq, compressed_tensors, gptq, inputs, pocketlm
from pocketlm.formats.compressed_config import spec_of
from pocketlm.formats.layouts import (
    FACTORS,
    ROLES,
    SCALES,
    Layout,
    float_packed,
    ordered,
    pack_quantized,
    plain_quantized,
)

Scheme = tuple[WeightSpec, Layout, ActivationSpec | None]
"""A weight's form, how it is stored, and how the inputs are rounded."""
READABLE = (compressed_tensors.NAME, pocketlm.NAME, "gptq", "awq", auto_round.NAME)
"""The ``quant_method`` of what is read here."""
BY_ROWS = (pack_quantized, plain_quantized, float_packed)
"""Layouts in which the rows of a weight lie one after the other."""


@dataclass(frozen=True)
class CompressedModule:
    """One compressed linear.

    Attributes:
        name: Module path, as the checkpoint spells it.
        spec: In what form its weight is.
        layout: How it is stored.
        activations: How its inputs are rounded; None: not at all.
        tensors: The stored tensors it consists of.
        transposed: The model's own weight is [I, O]; what is stored and decoded is [O, I].
    """

    name: str
    spec: WeightSpec
    layout: Layout
    tensors: tuple[str, ...]
    transposed: bool = False
    activations: ActivationSpec | None = None

    @property
    def tensor_name(self) -> str:
        """The weight's name before compression."""
        return f"{self.name}.weight"

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be read without the others."""
        plain = isinstance(self.spec, QuantSpec) and self.spec.by_rows and not self.transposed
        return plain and self.layout in BY_ROWS

    @property
    def scales(self) -> str | None:
        """The stored tensor of its scales; None where it has none, or those of two factors."""
        named = [name for name in self.tensors if name.removeprefix(f"{self.name}.") in SCALES]
        return named[0] if named else None


@dataclass(frozen=True)
class CompressedIndex:
    """What is compressed in an artifact, and how.

    Attributes:
        format: One of `READABLE`.
        modules: Module path → what is stored of it.
    """

    format: str
    modules: Mapping[str, CompressedModule]

    @classmethod
    def build(
        cls, config: Mapping[str, Any], tensor_names: Iterable[str]
    ) -> CompressedIndex | None:
        """Reads the index off an artifact.

        Args:
            config: config.json.
            tensor_names: Names of all stored tensors.

        Returns:
            The index; None if the model is not quantized.

        Raises:
            UnsupportedModel: If it is quantized in a way that is not read here.
            ArtifactError: If configuration and tensors contradict each other.
        """
        section = config.get("quantization_config")
        names = set(tensor_names)
        if section is None:
            stray = sorted(n for n in names if n.endswith((".weight_packed", ".qweight")))
            if stray:
                raise ArtifactError(
                    "is packed, but config.json has no quantization_config.", where=stray[0]
                )
            return None
        method = section.get("quant_method")
        if method == compressed_tensors.NAME:
            return cls(method, _from_compressed_tensors(section, names))
        if method == pocketlm.NAME:
            return cls(method, _from_pocketlm(section, names))
        if method in ("gptq", "awq", auto_round.NAME):
            return cls(method, _from_words(method, section, names))
        raise UnsupportedModel(
            f"quantized by '{method}', which is not read here.",
            where="config.json",
            remedy=f"{nearest(str(method), READABLE)} Or start from the model before quantization.",
        )

    def decode(self, module: str, read: Callable[[str], Tensor]) -> WeightTensor:
        """The weight of one linear, [O, I].

        Args:
            module: Module path, a key of `modules`.
            read: Gives a stored tensor by name.

        Raises:
            ArtifactError: If the tensors contradict each other or the configuration.
        """
        known = self.modules[module]
        tensors = {name: read(name) for name in known.tensors}
        return known.layout.decode(tensors, module, known.spec)

    def decode_rows(
        self,
        module: str,
        start: int,
        stop: int,
        rows: Callable[[str, int, int], Tensor],
        read: Callable[[str], Tensor],
    ) -> WeightTensor:
        """Codes and scales of some rows of a weight whose rows are stored by themselves.

        Args:
            module: Module path, a key of `modules`, of one that is `by_rows`.
            start: The first row.
            stop: The row after the last.
            rows: Gives rows of a stored tensor by name, start and stop.
            read: Gives a whole stored tensor by name.

        Raises:
            ArtifactError: If the tensors contradict each other or the configuration.
        """
        known, tensors = self.modules[module], dict[str, Tensor]()
        for role in known.layout.roles(known.spec):
            name = f"{module}.{role}"
            if role == "weight_shape":
                tensors[name] = torch.tensor([stop - start, int(read(name)[1])])
            else:
                tensors[name] = rows(name, start, stop)
        return known.layout.decode(tensors, module, known.spec)

    def quantizer(self, module: str, read: Callable[[str], Tensor]) -> InputQuantizer | None:
        """What the inputs of one linear are rounded with; None: nothing.

        Args:
            module: Module path, a key of `modules`.
            read: Gives a stored tensor by name.

        Raises:
            ArtifactError: If a static scale is unusable.
        """
        known = self.modules[module]
        roles = inputs.roles(known.activations)
        tensors = {f"{module}.{role}": read(f"{module}.{role}") for role in roles}
        return inputs.decode(tensors, module, known.activations)

    def shape(
        self,
        module: str,
        shapes: Callable[[str], tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> tuple[int, int]:
        """(O, I) of one linear, without decoding it.

        Args:
            module: Module path, a key of `modules`.
            shapes: Gives the shape of a stored tensor by name.
            read: Gives a stored tensor by name.
        """
        known = self.modules[module]
        return known.layout.shape(module, known.spec, shapes, read)

    @cached_property
    def replaced(self) -> Mapping[str, str]:
        """Stored tensor name → module path, of every tensor that belongs to a compressed linear."""
        return {name: module.name for module in self.modules.values() for name in module.tensors}


def _from_compressed_tensors(
    section: Mapping[str, Any], names: set[str]
) -> dict[str, CompressedModule]:
    for key in ("sparsity_config", "transform_config"):
        if section.get(key) and section[key] != {"format": "dense"}:
            raise _unread(f"'{key}' is set")
    groups = [
        (tuple(group["targets"]), _grid(group, section))
        for group in section.get("config_groups", {}).values()
    ]
    modules = {}
    for name in sorted(names):
        module, _, role = name.rpartition(".")
        if role in ("weight_packed", "weight_scale") and module not in modules:
            modules[module] = _module(module, *_grid_of(module, groups), names)
    if not modules:
        raise _unpacked()
    return modules


def _from_pocketlm(section: Mapping[str, Any], names: set[str]) -> dict[str, CompressedModule]:
    if section.get("format_version") != pocketlm.FORMAT_VERSION:
        raise _unread(f"format_version is {section.get('format_version')}")
    transposed = set(section["transposed"])
    modules = {}
    for group in section["groups"]:
        spec = parse_weight_spec(group["weights"], "quantization_config")
        layout, words = pocketlm.layout_of(spec), group.get("inputs")
        rounding = words and ActivationSpec.parse(words, where="quantization_config")
        for module in group["modules"]:
            modules[module] = _module(module, spec, layout, rounding, names, module in transposed)
    return modules


def _from_words(
    method: str, section: Mapping[str, Any], names: set[str]
) -> dict[str, CompressedModule]:
    """GPTQ, AWQ and AutoRound: what has a ``qweight`` is compressed."""
    modules = {}
    for name in sorted(names):
        module, _, role = name.rpartition(".")
        if role != "qweight":
            continue
        ordered = f"{module}.g_idx" in names
        if method == "gptq":
            spec, layout = gptq.scheme_of(section, module, ordered=ordered)
        elif method == "awq":
            spec, layout = awq.scheme_of(section)
        else:
            spec, layout = auto_round.scheme_of(section, module, ordered=ordered)
        modules[module] = _module(module, spec, layout, None, names)
    if not modules:
        raise _unpacked()
    return modules


def _module(
    module: str,
    spec: WeightSpec,
    layout: Layout,
    activations: ActivationSpec | None,
    names: set[str],
    transposed: bool = False,
) -> CompressedModule:
    roles = (*layout.roles(spec), *inputs.roles(activations))
    tensors = tuple(f"{module}.{role}" for role in roles)
    missing = [name for name in tensors if name not in names]
    if missing:
        raise ArtifactError(f"the tensor '{missing[0]}' is missing.", where=module)
    known = (*ROLES, *(f"{side}.{role}" for side in FACTORS for role in ROLES), *inputs.ROLES)
    extra = [f"{module}.{role}" for role in known if f"{module}.{role}" in names]
    surplus = sorted(set(extra) - set(tensors))
    if surplus:
        raise ArtifactError(
            f"the tensor '{surplus[0]}' does not belong to its grid ({spec!r}).", where=module
        )
    return CompressedModule(module, spec, layout, tensors, transposed, activations)


def _grid(group: Mapping[str, Any], section: Mapping[str, Any]) -> Scheme:
    """What a config group says, in our words."""
    form = group.get("format") or section.get("format")
    if form not in compressed_tensors.LAYOUTS:
        raise _unread(f"the format is '{form}'")
    weights = group.get("weights")
    if weights is None or group.get("output_activations"):
        raise _unread("outputs are quantized too" if weights else "weights are not quantized")
    spec = spec_of(weights, form)
    if spec is None:
        kind, strategy = weights.get("type", "int"), weights.get("strategy")
        raise _unread(f"weights are '{kind}' per '{strategy}' in '{form}'")
    words = group.get("input_activations")
    activations = inputs.spec_of(words) if words else None
    if words and activations is None:
        raise _unread(f"inputs are '{words.get('type')}' per '{words.get('strategy')}'")
    layout = compressed_tensors.LAYOUTS[form]
    if weights.get("actorder") in ("group", "dynamic", True):
        if layout is not pack_quantized:
            raise _unread(f"activation order is by group in '{form}'")
        layout = ordered
    return spec, layout, activations


def _grid_of(module: str, groups: list[tuple[tuple[str, ...], Scheme]]) -> Scheme:
    """What a module's group says: an exact target rules before a pattern, that before a class."""
    targeted = [(target, scheme) for targets, scheme in groups for target in targets]
    for target, scheme in targeted:
        if target == module:
            return scheme
    for target, scheme in targeted:
        if target.startswith("re:") and re.match(target[3:], module):
            return scheme
    for target, scheme in targeted:
        if not target.startswith("re:") and "." not in target:  # a class, such as Linear
            return scheme
    raise ArtifactError("is packed, but no config group targets it.", where=module)


def _unpacked() -> ArtifactError:
    return ArtifactError(
        "config.json speaks of compressed weights, but no tensor is packed.",
        where="quantization_config",
    )


def _unread(what: str, where: str = "quantization_config") -> UnsupportedModel:
    return UnsupportedModel(
        f"{what}, which is not read here.",
        where=where,
        remedy="Weights and inputs are read in the storages and schemes that `compress` writes.",
    )
