"""Reads and judges config.json before anything large is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from pocketlm.core.errors import SourceError, UnsupportedModel


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        SourceError: If it is absent or no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SourceError("is absent.", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read ({error}).", where=str(path)) from error
    return config


def transformers_config(directory: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration as transformers reads it.

    Raises:
        UnsupportedModel: If this version of transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} does not know this architecture.",
            where=str(directory),
        ) from error
