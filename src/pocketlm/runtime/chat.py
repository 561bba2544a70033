"""A conversation: messages, and the keys and values already computed for them.

Each turn goes through the chat template as a whole. As far as its tokens repeat what the cache
holds, they are not computed again; from the first difference on (some templates drop old reasoning)
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pocketlm.runtime.decode import Decoder, common_start
from pocketlm.runtime.generate import GenerationResult, generate_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """Messages back and forth with one model.

    Args:
        model: From `load`.
        tokenizer: Its tokenizer.
        system: What the model is told before the first message, if anything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._decoder = Decoder(model)
        self._computed: list[int] = []  # ids whose keys and values the decoder holds

    def send(
        self, message: str, *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> GenerationResult:
        """Sends a message and gets the answer.

        Args:
            message: What the user says.
            on_text: Called with each piece of the answer.
            **options: As `generate` takes them: max_new_tokens, temperature, top_k, top_p, seed,
                stop.

        Returns:
            The answer, which is also appended to `messages`.
        """
        turns = [*self.messages, {"role": "user", "content": message}]
        ids = prompt_ids(self.tokenizer, turns)
        self._decoder.cut(common_start(self._computed, ids[:-1]))
        result = generate_ids(
            self.model, self.tokenizer, ids, decoder=self._decoder, on_text=on_text, **options
        )
        self._computed = [*ids, *result.tokens[:-1]]
        self.messages = [*turns, {"role": "assistant", "content": result.text}]
        return result
