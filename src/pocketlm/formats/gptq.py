"""GPTQ files, of both conventions of zero points: ``gptq`` and ``gptq_v2``.

What AutoGPTQ and GPTQModel write and vLLM loads by itself. One grid is the rule; linears with
others are named by pattern under ``dynamic``. The tensors are in `layouts.gptq_packed`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.core.spec import QuantSpec
from pocketlm.formats.capabilities import FUSED
from pocketlm.formats.integer_format import IntegerFormat, Shape
from pocketlm.formats.layouts.gptq_packed import GptqPacked

BITS = (2, 3, 4, 8)  # what its readers unpack
ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}  # what a convention takes from a zero point
FUSED_NAMES = ("qkv_proj", "gate_up_proj")  # what vLLM calls the linears of `FUSED`

Readable = tuple[QuantSpec, GptqPacked]


def _refuses(spec: QuantSpec, shape: Shape) -> str | None:
    if spec.bits not in BITS:
        return f"has 2, 3, 4 or 8 bits, not {spec.bits}"
    if shape[0] % 32 or shape[1] % 32:
        return f"wants rows and columns in multiples of 32; this weight is {shape[0]} x {shape[1]}"
    return None


def _section(convention: str) -> Callable[..., dict[str, Any]]:
    def section(
        specs: Mapping[str, QuantSpec], ignored: Sequence[str], permuted: Sequence[str]
    ) -> dict[str, Any]:
        usual = Counter(specs.values()).most_common(1)[0][0]
        dynamic = {f"-:{_exactly([name])}": {} for name in ignored if _in_block(name)}
        for spec, modules in _others(specs, usual).items():
            for pattern in _patterns(modules):
                dynamic[f"+:{pattern}"] = _words(spec)
        return {
            "quant_method": "gptq",
            "checkpoint_format": convention,
            **_words(usual),
            "desc_act": bool(permuted),
            "lm_head": False,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }

    return section


def _words(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}


def _in_block(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def _others(specs: Mapping[str, QuantSpec], usual: QuantSpec) -> dict[QuantSpec, list[str]]:
    found: dict[QuantSpec, list[str]] = defaultdict(list)
    for module, spec in specs.items():
        if spec != usual:
            found[spec].append(module)
    return found


def _patterns(modules: Sequence[str]) -> list[str]:
    """A pattern for the linears of each parent; with the name of all three, where vLLM fuses."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        leaves[parent].append(leaf)
    patterns = []
    for parent, found in leaves.items():
        fused = [n for parts, n in zip(FUSED, FUSED_NAMES, strict=True) if set(parts) <= set(found)]
        patterns.append(_exactly([f"{parent}.{leaf}" for leaf in (*found, *fused)]))
    return patterns


def _exactly(modules: Sequence[str]) -> str:
    return f"^(?:{'|'.join(re.escape(module) for module in modules)})$"


GPTQ = IntegerFormat("gptq", GptqPacked(1), _refuses, _section("gptq"))
GPTQ_V2 = IntegerFormat("gptq_v2", GptqPacked(0), _refuses, _section("gptq_v2"))


def scheme_of(section: Mapping[str, Any], module: str, *, ordered: bool) -> Readable:
    """What the ``quantization_config`` of a GPTQ file says of one linear.

    Args:
        section: As any tool writes it.
        module: Module path.
        ordered: Whether the linear has a ``g_idx``.

    Raises:
        UnsupportedModel: If it is none that is read here.
    """
    known = section.get("checkpoint_format") or section.get("format") or "gptq"
    if known not in ZERO_SHIFTS:
        raise UnsupportedModel(
            f"a GPTQ file in the layout '{known}' is not read here.",
            where="quantization_config",
            remedy=f"Read are {' and '.join(ZERO_SHIFTS)}; start from one of them.",
        )
    words = {**section, **_override(section.get("dynamic") or {}, module)}
    group_size = words.get("group_size", 128)
    data = {
        "bits": words.get("bits"),
        "group_size": None if group_size in (None, -1) else group_size,
        "symmetric": words.get("sym", True),
    }
    try:
        spec = QuantSpec.parse(data, where="quantization_config")
    except ConfigError as error:
        raise UnsupportedModel(error.what, where="quantization_config") from None
    return spec, GptqPacked(ZERO_SHIFTS[known], ordered)


def _override(dynamic: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any]:
    """The words of the first pattern that matches, as GPTQModel and vLLM take them."""
    for pattern, words in dynamic.items():
        if pattern.startswith("-:"):
            continue
        try:
            if re.match(pattern.removeprefix("+:"), module):
                return words
        except re.error:
            raise UnsupportedModel(
                f"the pattern '{pattern}' under dynamic cannot be read.",
                where="quantization_config",
            ) from None
    return {}
