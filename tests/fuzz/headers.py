"""Feeds headers to the readers, guided by coverage: ``python headers.py gguf|safetensors|open``.

Anything but a header or a typed error stops it, and so does memory. What it finds becomes a case of
tests/unit/models/test_gguf_fuzz.py or test_damaged.py; those run by default, this does not. Needs
``pip install atheris``; what follows the reader's name is libFuzzer's:

    python tests/fuzz/headers.py gguf -max_total_time=300 -rss_limit_mb=2048 -malloc_limit_mb=64
"""

from __future__ import annotations

import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

with atheris.instrument_imports(include=["pocketlm"]):
    from pocketlm.core.errors import PocketLMError
    from pocketlm.formats.safetensors_header import read_header as read_safetensors
    from pocketlm.models import open_model
    from pocketlm.models.bytes import PositionalFile
    from pocketlm.models.gguf_header import read_header as read_gguf

MOST_BYTES = 16 << 20  # of memory that reading a small file may take
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _open(path: Path) -> None:
    """The whole way from a GGUF file to a model that could be compressed."""
    open_model(path)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gguf": ("any.gguf", lambda path: read_gguf(PositionalFile(path))),
    "safetensors": ("model.safetensors", read_safetensors),
    "open": ("any.gguf", _open),
}


def seeds(folder: Path, reader: str) -> None:
    """Sound files to begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    if reader == "safetensors":
        from tests.unit.models.test_damaged import WHOLE

        (folder / "whole").write_bytes(WHOLE)
    else:
        from tests.unit.models.test_gguf import write

        write(folder / "whole.gguf")


def main() -> None:
    """Runs until a limit of libFuzzer, or until something is found."""
    reader = sys.argv.pop(1)
    name, read = READERS[reader]
    corpus = FOLDER / "corpus"
    seeds(corpus, reader)

    def one(data: bytes) -> None:
        path = FOLDER / name
        path.write_bytes(data)
        if reader == "open":  # imports and caches of transformers count there
            with suppress(PocketLMError):
                read(path)
            return
        tracemalloc.start()
        try:
            with suppress(PocketLMError):
                read(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if peak > MOST_BYTES:
            raise MemoryError(f"{peak} bytes for a file of {len(data)}")

    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
