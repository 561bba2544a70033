"""What a model's files hold, without its skeleton: for exports, which need no class of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.core.views import TensorSource
from pocketlm.formats import kv_cache
from pocketlm.formats.pocketlm import plain_config, shortcuts_of
from pocketlm.models.config import read_config
from pocketlm.models.decoded import DecodedSource
from pocketlm.models.opening import open_model, resolve
from pocketlm.models.packed import PackedSource
from pocketlm.models.stream import SafetensorsSource
from pocketlm.models.tokenizer import side_files


@dataclass(frozen=True)
class StoredModel:
    """Files of one model.

    Attributes:
        path: The directory or GGUF file.
        source: The tensors, decoded where they are compressed.
        packed: The same source where it gives compressed weights as they are; else None.
        config: config.json without its quantization, or what stands for it.
        side_files: Files that go with the model.
        kv_cache: How engines are told to round the cache (`formats.kv_cache`); None: not at all.
        shortcuts: Matrices between blocks (`formats.pocketlm.shortcuts_of`); mostly none.
        bytes_stored: Of all tensors, as they are stored.
        close: Closes the files.
    """

    path: Path
    source: TensorSource
    packed: PackedSource | None
    config: Mapping[str, Any]
    side_files: Callable[[], Mapping[str, bytes]]
    bytes_stored: int
    close: Callable[[], None]
    kv_cache: Mapping[str, Any] | None = None
    shortcuts: Mapping[str, str] = field(default_factory=dict)


def open_stored(name: str | Path) -> StoredModel:
    """Opens the files of a model, compressed or not, by any tool whose format is read.

    Args:
        name: A directory, a hub id, a `.gguf` file or `smollm2-135m`.

    Raises:
        SourceError: If it cannot be read.
        UnsupportedModel: If it is quantized in a way that is not read here.
        ArtifactError: If its configuration and tensors contradict each other.
    """
    path = resolve(name)
    if path.is_file():
        view = open_model(path)
        size = path.stat().st_size
        return StoredModel(
            path, view.source, None, view.config, view.side_files, size, lambda: None
        )
    config, stored = read_config(path), SafetensorsSource(path)
    packed = DecodedSource.wrap(stored, config)
    return StoredModel(
        path=path,
        source=stored if packed is None else packed,
        packed=packed,
        config=plain_config(config),
        side_files=lambda: side_files(path),
        bytes_stored=sum(info.bytes_stored for info in stored.infos().values()),
        close=stored.close,
        kv_cache=kv_cache.scheme_of(config),
        shortcuts=shortcuts_of(config),
    )
