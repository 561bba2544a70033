"""How each engine loads an artifact, or why it cannot: for card, page and `serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stored import values_of
from pocketlm.engine.ledger import Ledger
from pocketlm.formats.capabilities import capability, check_layer, check_model
from pocketlm.models.gguf_metadata import ARCHITECTURES

GGUF = "model.gguf"


@dataclass(frozen=True)
class Loading:
    """One engine's way.

    Attributes:
        engine: Its name.
        note: What must be there first, or why it cannot load the artifact; a sentence.
        code: What to type; empty where it cannot.
        language: Of the code: ``python`` or ``sh``.
    """

    engine: str
    note: str
    code: str = ""
    language: str = "sh"


def loadings(config: Mapping[str, Any], ledger: Ledger, path: str = "PATH") -> list[Loading]:
    """Every engine's way, transformers first.

    Args:
        config: config.json of the artifact.
        ledger: Its accounts.
        path: What stands for it in the code.
    """
    return [
        _transformers(ledger, path),
        _vllm(config, ledger, path),
        _llama_cpp(config, path),
        Loading(
            "pocketlm",
            "From the packed weights; `pocketlm serve` answers OpenAI's clients.",
            f'import pocketlm\n\nmodel, tokenizer = pocketlm.load("{path}")',
            "python",
        ),
    ]


def grids(ledger: Ledger) -> dict[str, QuantSpec]:
    """Module path → grid, of the linears that are quantized."""
    forms = {name: entry.spec for name, entry in ledger.compressed().items()}
    values = {name: values_of(form) for name, form in forms.items() if form is not None}
    return {
        name.removesuffix(".weight"): grid
        for name, grid in values.items()
        if isinstance(grid, QuantSpec)
    }


def refused_by_vllm(ledger: Ledger) -> str | None:
    """Why vLLM cannot load an artifact, as far as its format goes; None where it can."""
    found = grids(ledger)
    inputs = {
        name.removesuffix(".weight"): entry.activations
        for name, entry in ledger.tensors.items()
        if entry.activations is not None
    }
    kept = [
        name.removesuffix(".weight")
        for name, entry in ledger.tensors.items()
        if entry.action == "kept" and name.endswith("_proj.weight")
    ]
    try:
        if ledger.format == "pocketlm" and not found:
            raise UnsupportedLayer("the format is pocketlm.")
        for module, spec in found.items():
            shape = ledger.tensors[f"{module}.weight"].shape
            sides = (shape[0], shape[1])
            check_layer(ledger.format, spec, sides, "vllm", module, inputs.get(module))
        check_model(found, kept, "vllm", inputs)
    except UnsupportedLayer as error:
        return str(error)
    return None


def _transformers(ledger: Ledger, path: str) -> Loading:
    wanted = dict(capability("transformers").versions_for(grids(ledger).values()))
    first = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if ledger.format != "compressed-tensors":
        wanted.pop("compressed-tensors", None)
    if ledger.format == "pocketlm":
        wanted["pocketlm"] = ""
        first = "import pocketlm.hf  # teaches transformers this format\n" + first
    packages = " ".join(f'"{n}>={v}"' if v else n for n, v in sorted(wanted.items()))
    return Loading(
        "transformers",
        f"After `pip install {packages}`; as dense weights.",
        f"{first}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}")',
        "python",
    )


def _vllm(config: Mapping[str, Any], ledger: Ledger, path: str) -> Loading:
    refused = refused_by_vllm(ledger)
    if refused is not None:
        return Loading("vLLM", f"vLLM cannot load it: {refused}")
    kind = (config.get("architectures") or ["this architecture"])[0]
    return Loading("vLLM", f"Where it supports {kind}.", f"vllm serve {path}")


def _llama_cpp(config: Mapping[str, Any], path: str) -> Loading:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return Loading("llama.cpp", f"GGUF is not written for models of the type {kind}.")
    return Loading(
        "llama.cpp",
        "By way of a GGUF file; the export tells which codes it keeps and which it rounds.",
        f"pocketlm export {path} --to gguf -o {GGUF}\nllama-cli -m {GGUF}",
    )
