"""Which checkpoint tensors make which parameter, both ways.

transformers renames tensors and fuses experts on loading; its own conversion tables are applied
here to names, so that a checkpoint is read the way transformers would. A parameter that no tensor
makes is an error; a tensor that makes no parameter is an extra: listed and carried over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from pocketlm.core.errors import SourceError, UnsupportedModel
from pocketlm.core.views import TensorInfo, TensorSource
from pocketlm.models.bytes import PIECE_BYTES


@dataclass(frozen=True)
class Binding:
    """How one parameter is made.

    Attributes:
        parameter: Its name in the model.
        tensors: The checkpoint tensors it is made of; a single one where nothing is converted.
        patterns: The converter's source pattern that each tensor matched.
        converter: transformers' conversion; None for a plain rename.
    """

    parameter: str
    tensors: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None

    @property
    def plain(self) -> bool:
        """Whether the parameter is one tensor under another name."""
        return self.converter is None

    def convert(self, source: TensorSource, model: PreTrainedModel) -> Tensor:
        """Reads the tensors and converts them as transformers does.

        Args:
            source: The checkpoint.
            model: Whose configuration and shapes some conversions need.

        Returns:
            The parameter's value, on the CPU.

        Raises:
            SourceError: If the conversion does not yield this parameter.
        """
        if self.converter is None:
            return source.read(self.tensors[0])
        converter = deepcopy(self.converter)
        first = _target_names(self.converter, self.parameter)[0]
        for tensor, pattern in zip(self.tensors, self.patterns, strict=True):
            converter.add_tensor(first, tensor, pattern, _reader(source, tensor))  # type: ignore[arg-type]
        made = converter.convert(first, model=model, config=model.config)
        if self.parameter not in made:
            what = f"transformers' conversion of '{self.tensors[0]}' does not give this parameter."
            raise SourceError(what, where=self.parameter)
        value = made[self.parameter]
        return value[0] if isinstance(value, list) else value


@dataclass(frozen=True)
class NameMap:
    """A checkpoint against a model.

    Attributes:
        bindings: Parameter (or saved buffer) → how it is made.
        extras: Tensors that belong to no parameter, such as draft layers.
        repeated: Tensors that say again what the tensor they are tied to says.
    """

    bindings: Mapping[str, Binding]
    extras: tuple[str, ...]
    repeated: tuple[str, ...] = ()

    def other_names(self, paths: Sequence[str]) -> dict[str, str]:
        """Module as the checkpoint names it → as the model does, where these differ.

        Args:
            paths: Of the model's modules that are looked into.
        """
        inside = tuple(f"{path}." for path in paths)
        found = {
            binding.tensors[0].removesuffix(".weight"): name.removesuffix(".weight")
            for name, binding in self.bindings.items()
            if binding.plain and name.endswith(".weight") and name.startswith(inside)
        }
        return {one: other for one, other in found.items() if one != other}


def map_names(model: PreTrainedModel, infos: Mapping[str, TensorInfo], where: str) -> NameMap:
    """Matches a checkpoint's tensors with a model's parameters.

    Args:
        model: On the meta device.
        infos: The checkpoint's tensors.
        where: The checkpoint, for messages.

    Returns:
        The bindings of every parameter, and what is left over.

    Raises:
        SourceError: If a parameter has no tensor, or a tensor the wrong shape.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    plain: dict[str, Binding] = {}
    merged: dict[str, list[tuple[str, str]]] = {}
    extras = []
    for tensor in sorted(infos, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, known)
        if name not in known and tensor in known:
            name, pattern = rename_source_key(tensor, [], [], prefix, known)
        if name not in known:
            extras.append(tensor)
        elif pattern is None:
            plain[name] = Binding(name, (tensor,))
        else:
            merged.setdefault(name, []).append((tensor, pattern))
    bindings = dict(plain)
    for first, pairs in merged.items():
        converter = by_pattern[pairs[0][1]]
        tensors, patterns = zip(*pairs, strict=True)
        for name in _target_names(converter, first):
            bindings[name] = Binding(name, tensors, patterns, converter)
    _check(model, bindings, infos, where)
    return NameMap(bindings, tuple(sorted(extras)))


def _target_names(converter: WeightConverter, name: str) -> list[str]:
    """Every parameter that one conversion makes, given any one of them; the first comes first."""
    targets = converter.target_patterns
    own = next((t for t in targets if t in name), None)
    if own is None:
        return [name]
    return [name.replace(own, target, 1) for target in targets]


def _reader(source: TensorSource, tensor: str):
    return lambda: source.read(tensor)


def _check(
    model: PreTrainedModel,
    bindings: dict[str, Binding],
    infos: Mapping[str, TensorInfo],
    where: str,
) -> None:
    """Shares bindings among tied names, then asks one for every parameter."""
    groups: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
        shapes[name] = tuple(parameter.shape)
    for names in groups.values():
        bound = [name for name in names if name in bindings]
        if not bound:
            raise SourceError(
                f"lacks a tensor for parameter '{names[0]}'.",
                where=where,
                remedy="The checkpoint is incomplete, or config.json belongs to another model.",
            )
        for name in names:
            bindings.setdefault(name, bindings[bound[0]])
    for name, shape in shapes.items():
        binding = bindings[name]
        if binding.plain and infos[binding.tensors[0]].shape != shape:
            stored = list(infos[binding.tensors[0]].shape)
            raise SourceError(
                f"tensor '{binding.tensors[0]}' is {stored}, but the model wants {list(shape)}.",
                where=where,
                remedy="config.json belongs to another model, or a quantizer packed the weights.",
            )


def settle_ties(model: PreTrainedModel, names: NameMap, source: TensorSource) -> NameMap:
    """Decides about parameters that the configuration ties but the checkpoint holds apart.

    As in transformers, equal tensors stay tied and different ones are untied.

    Args:
        model: On the meta device; parameters are untied in place.
        names: As `map_names` gives them.
        source: Read only where there is something to decide.

    Returns:
        The names, with each tie on one tensor; the other equal tensors are `repeated`.
    """
    bindings, repeated = dict(names.bindings), set(names.repeated)
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for first, *others in groups.values():
        for other in others:
            kept, doubted = bindings[first], bindings[other]
            if doubted.tensors == kept.tensors:
                continue
            if _equal_bytes(source, kept.tensors[0], doubted.tensors[0]):
                bindings[other] = kept
                repeated.add(doubted.tensors[0])
                continue
            owner, _, leaf = other.rpartition(".")
            apart = nn.Parameter(torch.empty_like(model.get_parameter(other)), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, apart)
    return NameMap(bindings, names.extras, tuple(sorted(repeated)))


def _equal_bytes(source: TensorSource, one: str, other: str) -> bool:
    if source.infos()[one].dtype != source.infos()[other].dtype:
        return False
    pairs = zip(source.chunks(one, PIECE_BYTES), source.chunks(other, PIECE_BYTES), strict=True)
    return all(a == b for a, b in pairs)


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under the names and in the shapes it would be saved with, tied ones once.

    Raises:
        UnsupportedModel: If the model is not wholly in memory.
    """
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_meta:
            raise UnsupportedModel("is not in memory (meta device).", where=name)
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach()
    return revert_weight_conversion(model, state)
