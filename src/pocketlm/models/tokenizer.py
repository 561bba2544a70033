"""The tokenizer of a model, and the files an artifact carries over beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pocketlm.core.errors import SourceError

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",  # its front matter goes into the artifact's own card
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def side_files(directory: Path) -> Mapping[str, bytes]:
    """The files that go with a model, by name relative to its directory."""
    found = {path for pattern in CARRIED for path in directory.glob(pattern) if path.is_file()}
    found |= {path for path in directory.glob("additional_chat_templates/*") if path.is_file()}
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(found)}


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Raises:
        SourceError: If there is none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"has no tokenizer that loads ({error}).", where=str(directory)
        ) from error
