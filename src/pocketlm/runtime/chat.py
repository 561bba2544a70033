"""A conversation: messages, and the keys and values already computed for them.

Each turn goes through the chat template as a whole. As far as its tokens repeat what the cache
holds, they are not computed again; from the first difference on (some templates drop old reasoning)
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pocketlm.runtime.generate import GenerationResult, generate_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


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
        self._cache: Cache | None = None
        self._cached_ids: list[int] = []

    def send(
        self, message: str, *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> GenerationResult:
        """Sends a message and gets the answer.

        Args:
            message: What the user says.
            on_text: Called with each piece of the answer.
            **options: As `generate` takes them: max_new_tokens, temperature, top_p, seed, stop.

        Returns:
            The answer, which is also appended to `messages`.
        """
        turns = [*self.messages, {"role": "user", "content": message}]
        ids = prompt_ids(self.tokenizer, turns)
        cache = self._prefix_cache(ids)
        result = generate_ids(
            self.model, self.tokenizer, ids, cache=cache, on_text=on_text, **options
        )
        self._cache, self._cached_ids = cache, [*ids, *result.tokens[:-1]]
        self.messages = [*turns, {"role": "assistant", "content": result.text}]
        return result

    def _prefix_cache(self, ids: list[int]) -> Cache:
        """The cache, cut to the tokens that `ids` begins with; a new one where it cannot be cut."""
        from pocketlm.models.runtime_model import cut_cache, new_cache

        same = 0
        for old, new in zip(self._cached_ids, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        if self._cache is None or not cut_cache(self._cache, same):
            return new_cache(self.model)
        return self._cache
