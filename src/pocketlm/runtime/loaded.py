"""A model and its tokenizer as one thing that answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketlm.runtime.chat import Conversation
from pocketlm.runtime.generate import GenerationResult, generate, generate_rows, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """What `pocketlm.load` gives: ``model, tokenizer = pocketlm.load(path)``, and it answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def generate(self, prompt: str, **options: Any) -> GenerationResult:
        """Answers a prompt.

        Args:
            prompt: Goes through the chat template where the tokenizer has one.
            **options: As `pocketlm.runtime.generate.generate` takes them.
        """
        return generate(self.model, self.tokenizer, prompt, **options)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, str]]],
        **options: Any,
    ) -> list[GenerationResult]:
        """Answers several prompts at once.

        Args:
            prompts: Texts to continue, or conversations that go through the chat template.
            **options: As `pocketlm.runtime.generate.generate_rows` takes them.
        """
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        return generate_rows(self.model, self.tokenizer, rows, **options)

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The answer piece by piece, while it is written.

        Args:
            prompt: As for `generate`.
            **options: As for `generate`.
        """
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

        def write() -> None:
            try:
                self.generate(prompt, on_text=pieces.put, **options)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        Thread(target=write, daemon=True).start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def chat(self, system: str | None = None) -> Conversation:
        """Begins a conversation.

        Args:
            system: What the model is told first.
        """
        return Conversation(self.model, self.tokenizer, system)
