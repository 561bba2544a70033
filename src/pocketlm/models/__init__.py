"""Models as streams of blocks; transformers' classes end here."""

from pocketlm.models.adapter import Model
from pocketlm.models.opening import open_model

__all__ = ["Model", "open_model"]
