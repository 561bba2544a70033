"""A model as a GGUF file holds it: architecture, tensors, metadata; one object for the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from pocketlm.formats.gguf_mix import Architecture
from pocketlm.models.adapter import Model
from pocketlm.models.gguf_experts import stacks
from pocketlm.models.gguf_metadata import (
    architecture,
    metadata,
    require_same_function,
    rotary_tables,
    tokens_metadata,
    window_note,
)
from pocketlm.models.gguf_names import gguf_names, norm_shift, row_order
from pocketlm.models.gguf_vocabulary import vocabulary
from pocketlm.models.gguf_write import Value


@dataclass(frozen=True)
class GgufForm:
    """What a GGUF file says of a model.

    Attributes:
        model: The model.
        config: transformers' configuration.
        architecture: llama.cpp's name of it.
    """

    model: Model
    config: PretrainedConfig
    architecture: Architecture

    @classmethod
    def of(cls, model: Model) -> GgufForm:
        """The form of a model.

        Raises:
            UnsupportedModel: If no writer for its architecture exists here, or llama.cpp would
                compute another function.
        """
        config = model.skeleton.model.config
        known = architecture(config)
        require_same_function(config, known.name)
        return cls(model, config, known)

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """Names of a checkpoint → names in the file; what llama.cpp does not want is left out.

        Raises:
            UnsupportedModel: If llama.cpp has no place for a tensor.
            ConfigError: If the package gguf is not installed.
        """
        return gguf_names(self.config, tensors)

    def stacks(self, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """What each tensor of the file is made of: one tensor, or a block's experts in order.

        Args:
            names: As `names` gives them, of all tensors.

        Raises:
            ArtifactError: If an expert is missing, or two tensors have one name.
        """
        return stacks(names, self.architecture.experts)

    def metadata(self, name: str, file_type: int) -> dict[str, Value]:
        """Everything the file says beside its tensors.

        Args:
            name: Of the model, for people.
            file_type: llama.cpp's number of the mixture of types.

        Raises:
            UnsupportedModel: If llama.cpp would compute or tokenize in another way.
        """
        tokens = vocabulary(self.model.tokenizer(), self.config.vocab_size)
        return metadata(self.config, name, file_type) | tokens_metadata(tokens)

    def tables(self) -> dict[str, Tensor]:
        """Tensors that no checkpoint has: divisors of rotary frequencies."""
        return rotary_tables(self.config)

    def row_order(self, tensor: str) -> Tensor | None:
        """In which order the rows of a tensor of the file are written; None: as they are."""
        return row_order(self.config, tensor)

    def norm_shift(self, tensor: str) -> float:
        """What is added to a tensor of the file."""
        return norm_shift(self.config, tensor)

    def notes(self) -> list[str]:
        """What llama.cpp computes otherwise in rare cases."""
        note = window_note(self.config)
        return [] if note is None else [note]
