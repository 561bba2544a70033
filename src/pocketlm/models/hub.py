"""Models of the Hugging Face hub: found in the local cache or downloaded, safetensors only."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pocketlm.core.errors import SourceError
from pocketlm.models.tokenizer import CARRIED

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


def download(name: str, revision: str | None) -> Path:
    """The local directory of a hub model.

    Args:
        name: Such as ``Qwen/Qwen3-8B``.
        revision: A branch, tag or commit; None: the default branch.

    Raises:
        SourceError: If there is no such model, access is denied, or the hub cannot be reached.
    """
    missing = "Give an existing directory, a .gguf file, or a hub id such as Qwen/Qwen3-8B."
    try:
        path = snapshot_download(name, revision=revision, allow_patterns=[*WEIGHTS, *CARRIED])
    except HFValidationError as error:
        raise SourceError(
            "is no existing path and no hub id.", where=name, remedy=missing
        ) from error
    except LocalEntryNotFoundError as error:
        what = "is no existing path, and the hub cannot be reached to look it up."
        raise SourceError(what, where=name, remedy=missing) from error
    except HfHubHTTPError as error:
        what = f"is no existing path, and the hub does not give it ({type(error).__name__})."
        remedy = "Check the spelling and revision, or log in if access is restricted."
        raise SourceError(what, where=name, remedy=remedy) from error
    except OSError as error:
        what = f"could not be downloaded ({error})."
        raise SourceError(
            what, where=name, remedy="Check the network and the free disk."
        ) from error
    return Path(path)
