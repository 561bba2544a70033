"""The format ``pocketlm``: what no engine's own format can hold, loaded through `pocketlm.hf`.

Today that is GPT-2's Conv1D, whose weight lies transposed ([I, O]) in the checkpoint. Its codes
are packed as [O, I], so that groups run along the inputs as everywhere; the section of config.json
lists the module under ``transposed``. Tensors and names are those of `formats.compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.core.errors import ConfigError
from pocketlm.core.spec import QuantSpec
from pocketlm.formats import compressed_tensors
from pocketlm.formats.capabilities import check_layer
from pocketlm.formats.compressed_tensors import decode, encode, names, stored_bytes

__all__ = ["NAME", "check", "config_section", "decode", "encode", "names", "stored_bytes"]

NAME = "pocketlm"
FORMAT_VERSION = 1


def check(
    spec: QuantSpec, shape: tuple[int, int], target: str = "transformers", where: str | None = None
) -> None:
    """Refuses a grid that `target` cannot load in this format.

    Args:
        spec: The grid.
        shape: (O, I) of the weight, in the orientation of a Linear.
        target: Name of the engine.
        where: Module path for the message.

    Raises:
        UnsupportedLayer: With what to choose instead.
        ConfigError: If the target is unknown.
    """
    compressed_tensors.check(spec, shape, "transformers", where)
    check_layer(NAME, spec, shape, target, where)


def config_section(
    specs: Mapping[str, QuantSpec], ignored: Sequence[str], transposed: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: every module by name, grouped by grid.

    Args:
        specs: Module path → grid, of every compressed linear.
        ignored: Module paths of every linear that is kept.
        transposed: Those of `specs` whose weight is [I, O] in the model.

    Returns:
        Plain JSON, deterministic.

    Raises:
        ConfigError: If nothing is compressed, or a transposed module has no grid.
    """
    if not specs:
        raise ConfigError("no linear is compressed; there is nothing to configure.")
    strangers = [module for module in transposed if module not in specs]
    if strangers:
        raise ConfigError("a module without a grid is called transposed.", where=strangers[0])
    groups: dict[QuantSpec, list[str]] = {}
    for module, spec in specs.items():
        groups.setdefault(spec, []).append(module)
    return {
        "quant_method": NAME,
        "format_version": FORMAT_VERSION,
        "groups": [
            {"weights": spec.model_dump(), "modules": modules} for spec, modules in groups.items()
        ],
        "transposed": list(transposed),
        "ignore": list(ignored),
    }
