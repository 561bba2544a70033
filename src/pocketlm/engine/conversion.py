"""From one compressed format to another, without the original: codes stay codes.

Every linear is read as it is stored, written in the other format's layout, decoded again and
compared: what is lost, if anything, is measured, not assumed. What a format cannot hold is refused
before anything is written, with the nearest one that can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.permuted import Permuted
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.stored import DenseSpec, SparseSpec, WeightSpec
from pocketlm.core.tensors import Sparse, WeightTensor
from pocketlm.formats import compressed_tensors, format_for, kv_cache
from pocketlm.formats.capabilities import capability, check_layer, check_model
from pocketlm.formats.shards import Entry
from pocketlm.models.packed import PackedForm, PackedSource
from pocketlm.models.stored import StoredModel

CHUNK_BYTES = 16 << 20
PACKED_FORMS = {  # and where in config.json it says how it is quantized
    "compressed-tensors": "quantization_config",
    "gptq": "quantization_config",
    "gptq_v2": "quantization_config",
    "awq": "quantization_config",
    "mlx": "quantization",
}
CACHE_NOTE = "the cache of keys and values is not rounded any more; its scales are left out."
ORDERED = ("gptq", "gptq_v2")  # hold groups whose columns lie scattered


@dataclass
class Conversion:
    """What is written, and what was found on the way.

    Attributes:
        form: The format.
        target: The engine that is to load it; None: any.
        source: Gives the weights.
        specs: Module path → grid, of every linear that stays compressed.
        inputs: Module path → how its inputs are rounded, where the format holds that.
        ignored: Module paths of the matrices that are not compressed.
        entries: Every tensor.
        notes: What is lost, known beforehand.
        kv_cache: How engines are told to round the cache, where the format can say it.
    """

    form: str
    target: str | None
    source: PackedSource
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    inputs: dict[str, ActivationSpec] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kv_cache: Mapping[str, Any] | None = None
    _quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)
    _permuted: dict[str, None] = field(default_factory=dict)
    _last: tuple[str, dict[str, Tensor]] = ("", {})

    def add(self, name: str, form: PackedForm, spec: QuantSpec) -> None:
        """A linear that stays compressed."""
        module = name.removesuffix(".weight")
        writer, activations = format_for(self.form), self.inputs.get(module)
        self.specs[module] = spec
        parts = writer.parts(spec, form.shape, form.scale_dtype, activations)
        for role, (shape, dtype) in parts.items():
            self.entries.append(Entry(f"{module}.{role}", dtype, shape, self._chunks(name, role)))

    def drop_cache(self, model: StoredModel) -> list[str]:
        """Keeps the cache's scheme where the format has words for it; else names its scales."""
        if model.kv_cache is None:
            return []
        if self.form == compressed_tensors.NAME:
            self.kv_cache = model.kv_cache
            return []
        self.notes.append(CACHE_NOTE)
        return kv_cache.scales(model.source.infos())

    def section(self) -> dict[str, Any]:
        """What config.json says; complete once all is written."""
        writer = format_for(self.form)
        if self.form == compressed_tensors.NAME:
            return writer.config_section(self.specs, self.ignored, self.inputs, self.kv_cache)
        return writer.config_section(
            self.specs, self.ignored, self.inputs, permuted=list(self._permuted)
        )

    def losses(self) -> list[str]:
        """What the written weights lost against what was read, as sentences."""
        worst = max(self._errors, key=lambda module: self._errors[module])
        changed = sum(error > 0 for error in self._errors.values())
        if not changed:
            return [f"{len(self._errors)} linears decode to the same values, bit for bit."]
        return [
            f"{changed} of {len(self._errors)} linears changed, by at most "
            f"{self._errors[worst]:.1e} of their norm ({worst}): scales or offsets are rounded."
        ]

    def _chunks(self, name: str, role: str):
        def chunks() -> Iterator[memoryview]:
            module = name.removesuffix(".weight")
            data = self._encoded(name)[f"{module}.{role}"].contiguous().flatten()
            raw = data.view(torch.uint8).numpy().data
            for start in range(0, len(raw), CHUNK_BYTES):
                yield raw[start : start + CHUNK_BYTES]

        return chunks

    def _encoded(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of one linear; those of the last are kept for its other parts."""
        if self._last[0] == name:
            return self._last[1]
        module = name.removesuffix(".weight")
        weight = self.source.packed(name)
        if isinstance(weight, Sparse):
            weight = weight.values
        if isinstance(weight, Permuted):
            self._require_order(module)
        quantizer = self._quantizers.get(module) if module in self.inputs else None
        writer = format_for(self.form)
        tensors = writer.encode(name, weight, quantizer)
        if module not in self._errors:
            again = writer.decode(tensors, module, self.specs[module])
            self._errors[module] = _relative_error(again, weight)
        self._last = (name, tensors)
        return tensors

    def _require_order(self, module: str) -> None:
        held = self.form in ORDERED
        if not held or (self.target is not None and not capability(self.target).activation_order):
            raise UnsupportedLayer(
                "the columns of its groups lie scattered (activation order), which "
                f"{self.form if not held else self.target} does not take.",
                where=module,
                remedy="Write dense" + ("." if held else ", or gptq."),
            )
        self._permuted[module] = None


def convert(
    model: StoredModel, form: str, target: str | None, vectors: torch.dtype | None = None
) -> Conversion:
    """Plans the writing of a compressed model in another format.

    Args:
        model: The model.
        form: One of `PACKED_FORMS`.
        target: The engine that is to load it; None: the format's own limits only.
        vectors: What tensors of one axis are written in; None: as they are.

    Returns:
        Entries to be written; section and losses once they are.

    Raises:
        ConfigError: If nothing is compressed, or the target is unknown.
        UnsupportedLayer: If the format cannot hold a linear or the target cannot run it.
    """
    source = model.packed
    if source is None:
        raise ConfigError(
            "holds no compressed weights that can be handed on.",
            where=str(model.path),
            remedy="Export it with --to dense, or compress it: `pocketlm compress`.",
        )
    forms = source.forms()
    made = Conversion(form, target, source, _quantizers=source.quantizers())
    _settle(made, forms)
    _refuse(forms, form, target)
    dropped = made.drop_cache(model)
    for name, info in source.infos().items():
        if name in dropped:
            continue
        held = forms.get(name)
        spec = None if held is None else _grid(held.spec)
        if held is not None and spec is not None:
            made.add(name, held, spec)
            continue
        dtype = info.dtype
        if held is not None and isinstance(held.spec, DenseSpec):
            dtype = getattr(torch, held.spec.dtype)
        elif vectors is not None and len(info.shape) == 1 and dtype.is_floating_point:
            dtype = vectors
        made.entries.append(Entry(name, dtype, info.shape, _copied(source, name, dtype)))
        if name.endswith(".weight") and len(info.shape) == 2:
            made.ignored.append(name.removesuffix(".weight"))
    if "lm_head" not in (*made.ignored, *made.specs):
        made.ignored.append("lm_head")
    made.section()  # grids that cannot stand in one file are refused before any work
    if target is not None:
        check_model(made.specs, made.ignored, target, made.inputs)
    return made


def _settle(made: Conversion, forms: Mapping[str, PackedForm]) -> None:
    """What the format drops besides weights: roundings of inputs, masks."""
    sparse = 0
    for name, form in forms.items():
        if form.activations is not None and made.form == compressed_tensors.NAME:
            made.inputs[name.removesuffix(".weight")] = form.activations
        sparse += isinstance(form.spec, SparseSpec)
    rounded = sum(form.activations is not None for form in forms.values()) - len(made.inputs)
    if rounded:
        made.notes.append(f"the inputs of {rounded} linears are not rounded any more.")
    if sparse:
        made.notes.append(f"{sparse} sparse linears hold their zeros like other values.")


def _grid(spec: WeightSpec) -> QuantSpec | None:
    """The grid of what can stay compressed: codes, or codes behind a mask."""
    if isinstance(spec, SparseSpec):
        spec = spec.values
    return spec if isinstance(spec, QuantSpec) else None


def _refuse(forms: Mapping[str, PackedForm], form: str, target: str | None) -> None:
    """Checks every linear; names the nearest format that could hold them all.

    Raises:
        UnsupportedLayer: For the first that is not held.
    """
    why = _first_refusal(forms, form, target)
    if why is None:
        return
    others = [other for other in PACKED_FORMS if other != form]
    able = (other for other in others if _first_refusal(forms, other, target) is None)
    nearest = next(able, "dense")
    raise UnsupportedLayer(why.what, where=why.where, remedy=f"--to {nearest} can hold it.")


def _first_refusal(
    forms: Mapping[str, PackedForm], form: str, target: str | None
) -> UnsupportedLayer | None:
    for name, held in forms.items():
        try:
            _check(name, held, form, target)
        except UnsupportedLayer as error:
            return error
    return None


def _check(name: str, held: PackedForm, form: str, target: str | None) -> None:
    module, spec = name.removesuffix(".weight"), _grid(held.spec)
    if isinstance(held.spec, DenseSpec):
        return
    if spec is None:
        raise UnsupportedLayer(f"{form} cannot hold {held.spec.name}.", where=module)
    if held.transposed:
        raise UnsupportedLayer(f"{form} holds no transposed linear (Conv1D).", where=module)
    if not any(part.isdigit() for part in module.split(".")) and form != held.format:
        raise UnsupportedLayer(f"{form} holds no compressed embedding or head.", where=module)
    if form == compressed_tensors.NAME:
        compressed_tensors.storage(spec, held.activations, module)
        compressed_tensors.check_shape(spec, held.shape, module)
        if target is not None:
            check_layer(form, spec, held.shape, target, module, held.activations)
    else:
        format_for(form).check(spec, held.shape, target, module)


def _copied(source: PackedSource, name: str, dtype: torch.dtype):
    def chunks() -> Iterator[bytes | memoryview]:
        if dtype == source.infos()[name].dtype:
            yield from source.chunks(name, CHUNK_BYTES)
        else:
            yield source.read(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy().data

    return chunks


def _relative_error(found: WeightTensor, expected: WeightTensor) -> float:
    """‖found - expected‖ / ‖expected‖ of the decoded weights, in float32."""
    expected_OI = expected.dequantize()
    difference = float((found.dequantize() - expected_OI).norm())
    return difference / max(float(expected_OI.norm()), torch.finfo(torch.float32).tiny)
