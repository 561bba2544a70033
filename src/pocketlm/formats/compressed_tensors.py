"""``pack-quantized`` of compressed-tensors: what vLLM and transformers load by themselves.

A linear ``x.weight`` [O, I] is stored as

- ``x.weight_packed``  int32 [O, ⌈I·bits/32⌉], the codes packed along rows (`packing.py`);
- ``x.weight_scale``   [O, G] in the scales' own dtype, G = 1 for one scale a row;
- ``x.weight_zero_point``  int32 [⌈O·bits/32⌉, G], packed along columns; asymmetric grids only;
- ``x.weight_shape``   int64 [2], O and I.

What it means: w = scale · (code - zero), both codes and zeros signed. Only linears and embeddings;
GPT-2's transposed Conv1D goes through `formats.pocketlm`. No activation order on disk (``g_idx``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer
from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt
from pocketlm.formats.capabilities import check_layer
from pocketlm.formats.packing import pack, unpack, words_per_row

NAME = "compressed-tensors"
MINIMUM_VERSION = "0.15.0"  # what transformers 5 asks for
MINIMUM_VERSION_DENSE = "0.18.0"  # the first release that packs 3, 5, 6 and 7 bits densely
LAYOUT_BEFORE_DENSE = (2, 4, 8)  # bits whose words are the same in older releases
SHAPE_BYTES = 16  # of weight_shape


def minimum_version(specs: Mapping[str, QuantSpec]) -> str:
    """The oldest release of compressed-tensors that reads these grids."""
    odd = any(spec.bits not in LAYOUT_BEFORE_DENSE for spec in specs.values())
    return MINIMUM_VERSION_DENSE if odd else MINIMUM_VERSION


def module_of(tensor_name: str) -> str:
    """The module path of a weight's name.

    Raises:
        UnsupportedLayer: If the tensor is no module's ``weight``.
    """
    module, dot, leaf = tensor_name.rpartition(".")
    if not dot or leaf != "weight":
        raise UnsupportedLayer(
            "only a tensor named '….weight' can be stored as codes and scales.",
            where=tensor_name,
            remedy="Put it into ignore.",
        )
    return module


def names(tensor_name: str, spec: QuantSpec) -> tuple[str, ...]:
    """The tensors that take the place of a weight, in the order in which they are written.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        spec: Its grid.
    """
    module = module_of(tensor_name)
    roles = ["weight_packed", "weight_scale", "weight_shape"]
    if not spec.symmetric:
        roles.insert(2, "weight_zero_point")
    return tuple(f"{module}.{role}" for role in roles)


def encode(tensor_name: str, packed: PackedInt) -> dict[str, Tensor]:
    """The stored tensors of a weight, by name.

    Args:
        tensor_name: The weight's name in the source, ``….weight``.
        packed: Codes, scales and zero points of [O, I].

    Returns:
        The tensors that `names` lists, contiguous, on the device of the codes.

    Raises:
        ArtifactError: If a code or zero point does not fit, or a scale is not finite.
    """
    module, shape = module_of(tensor_name), tuple(packed.codes_OI.shape)
    if not bool(torch.isfinite(packed.scale_OG).all()):
        raise ArtifactError("a scale is not finite.", where=module)
    out = {
        f"{module}.weight_packed": pack(packed.codes_OI, packed.bits),
        f"{module}.weight_scale": packed.scale_OG.contiguous(),
    }
    if packed.zero_OG is not None:
        zero_GO = pack(packed.zero_OG.T.contiguous(), packed.bits)
        out[f"{module}.weight_zero_point"] = zero_GO.T.contiguous()
    out[f"{module}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    return out


def decode(tensors: Mapping[str, Tensor], base: str, bits: int | None = None) -> PackedInt:
    """The codes and scales of a weight, from its stored tensors.

    Args:
        tensors: By name, at least those of this weight; others are not looked at.
        base: Module path, or the weight's name in the source.
        bits: Bits of a code; None: told from the width of the packed rows (needs I ≥ 32).

    Raises:
        ArtifactError: If a tensor is missing or the shapes contradict each other.
    """
    module = base.removesuffix(".weight")
    words_OW = _take(tensors, module, "weight_packed")
    scale_OG = _take(tensors, module, "weight_scale")
    shape = [int(side) for side in _take(tensors, module, "weight_shape")]
    if len(shape) != 2 or words_OW.dim() != 2 or words_OW.shape[0] != shape[0]:
        raise ArtifactError(
            f"weight_shape is {shape}, weight_packed is {tuple(words_OW.shape)}.", where=module
        )
    rows, columns = shape
    if bits is None:
        bits = _bits_of(words_OW.shape[1], columns, module)
    fits = scale_OG.dim() == 2 and scale_OG.shape[0] == rows and scale_OG.shape[1] > 0
    if not fits or columns % scale_OG.shape[1]:
        raise ArtifactError(
            f"weight_scale {tuple(scale_OG.shape)} does not divide a {rows} x {columns} weight.",
            where=module,
        )
    zero_OG = None
    if f"{module}.weight_zero_point" in tensors:
        zero_PG = tensors[f"{module}.weight_zero_point"]
        expected = (words_per_row(rows, bits), scale_OG.shape[1])
        if tuple(zero_PG.shape) != expected:
            raise ArtifactError(
                f"weight_zero_point is {tuple(zero_PG.shape)}, not {expected}.", where=module
            )
        zero_OG = unpack(zero_PG.T.contiguous(), bits, rows).T.contiguous()
    try:
        codes_OI = unpack(words_OW, bits, columns)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=module, remedy=error.remedy) from None
    return PackedInt(codes_OI, scale_OG, zero_OG, bits)


def _bits_of(words: int, columns: int, module: str) -> int:
    """Bits of a code, told from the width of a packed row; unique for 32 columns and more."""
    bits = words * 32 // max(columns, 1)
    if columns < 32 or not 2 <= bits <= 8:
        raise ArtifactError(
            f"rows of {words} words do not tell the bits of {columns} codes.", where=module
        )
    return bits


def stored_bytes(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
    """Bytes on disk of one weight, everything counted.

    Args:
        spec: Its grid.
        shape: (O, I).
        scale_dtype: The dtype in which scales are stored.
    """
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    total = 4 * rows * words_per_row(columns, spec.bits) + SHAPE_BYTES
    total += rows * groups * torch.empty(0, dtype=scale_dtype).element_size()
    if not spec.symmetric:
        total += 4 * groups * words_per_row(rows, spec.bits)
    return total


def check(
    spec: QuantSpec, shape: tuple[int, int], target: str = "transformers", where: str | None = None
) -> None:
    """Refuses a grid that this format cannot hold or `target` cannot run.

    Args:
        spec: The grid.
        shape: (O, I) of the weight.
        target: Name of the engine.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    if shape[1] < 32:
        raise UnsupportedLayer(
            f"a weight of {shape[1]} columns is too narrow; 32 are needed.",
            where=where,
            remedy="Put the layer into ignore.",
        )
    check_layer(NAME, spec, shape, target, where)


def config_section(specs: Mapping[str, QuantSpec], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    One group for each distinct grid. A single grid targets ``Linear``; several name their modules
    (by pattern where a leaf name tells them apart), because engines that fuse q, k and v look at
    the class before the parts, and ``Linear`` would win there over a more exact name.

    Args:
        specs: Module path → grid, of every compressed linear.
        ignored: Module paths of every linear that is kept; ``lm_head`` is added where it is kept.

    Returns:
        Plain JSON, deterministic.

    Raises:
        ConfigError: If nothing is compressed, or a module is both compressed and ignored.
    """
    if not specs:
        raise ConfigError("no linear is compressed; there is nothing to configure.")
    both = sorted(set(specs) & set(ignored))
    if both:
        raise ConfigError("a module is compressed and ignored.", where=both[0])
    ignore = list(dict.fromkeys(ignored))
    if "lm_head" not in specs and "lm_head" not in ignore:
        ignore.append("lm_head")  # a tied head is no tensor of the file, yet a Linear of the model
    groups: dict[str, Any] = {}
    for index, (spec, targets) in enumerate(_targets(specs)):
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": weight_args(spec),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    section = {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if not all(spec.symmetric for spec in specs.values()):
        # transformers 5.23 with compressed-tensors 0.20 lays out zero points unpacked before it
        # loads, and finds the file's too small, unless told to decode at once. 5.17 with 0.19
        # loads them either way.
        section["dequantize"] = True
    return section


def weight_args(spec: QuantSpec) -> dict[str, Any]:
    """A grid in the words of the format."""
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "group" if spec.group_size else "channel",
        "group_size": spec.group_size,
        "actorder": None,
        "dynamic": False,
    }


def _targets(specs: Mapping[str, QuantSpec]) -> list[tuple[QuantSpec, list[str]]]:
    """Distinct grids, in order of appearance, with what selects their modules."""
    distinct = list(dict.fromkeys(specs.values()))
    if len(distinct) == 1:
        return [(distinct[0], ["Linear"])]
    owners: dict[str, set[QuantSpec]] = defaultdict(set)
    for module, spec in specs.items():
        owners[_pattern(module)].add(spec)
    chosen: dict[QuantSpec, dict[str, None]] = {spec: {} for spec in distinct}
    for module, spec in specs.items():
        pattern = _pattern(module)
        chosen[spec][pattern if len(owners[pattern]) == 1 else module] = None
    return [(spec, list(targets)) for spec, targets in chosen.items()]


def _pattern(module: str) -> str:
    """A pattern over all modules that end alike, up to the nearest name that is no number.

    ``model.layers.0.mlp.down_proj`` gives ``mlp.down_proj``, an expert's ``experts.3.down_proj``
    gives ``experts.<number>.down_proj``: experts and dense linears never share one.
    """
    tail: list[str] = []
    for part in reversed(module.split(".")):
        tail.insert(0, r"\d+" if part.isdigit() else re.escape(part))
        if len(tail) > 1 and not part.isdigit():
            break
    joined = r"\.".join(tail)
    return rf"re:(.*\.)?{joined}$"


def _take(tensors: Mapping[str, Tensor], module: str, role: str) -> Tensor:
    name = f"{module}.{role}"
    if name not in tensors:
        raise ArtifactError(f"the tensor '{name}' is missing.", where=module)
    return tensors[name]
