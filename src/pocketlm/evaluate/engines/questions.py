"""What every engine is asked: the same token ids, of the builtin text if there is a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.calibration.texts import load_text
from pocketlm.core.errors import ConfigError
from pocketlm.models.adapter import Model

SEQUENCES, TOKENS = 4, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 12, 32
WORDS = (
    "The capital of France is Paris. In 1984 the 3rd edition\n\n didn't sell 1234 copies: naïve."
)


@dataclass(frozen=True)
class Questions:
    """Token ids.

    Attributes:
        sequences_NT: What log-probabilities are compared on.
        prompts: What is continued greedily, all of one length.
        new_tokens: By how many tokens.
        source: Where the ids come from, in words.
    """

    sequences_NT: Tensor
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    source: str


def questions_for(model: Model) -> Questions:
    """The fixed questions for a model.

    Ids are those of the evaluation half of the builtin text, without special tokens; a model that
    came without a tokenizer gets ids by a formula.

    Args:
        model: It says context, vocabulary and tokenizer.
    """
    length = min(TOKENS, model.context)
    new = min(NEW_TOKENS, model.context - PROMPT_TOKENS)
    asked = SEQUENCES * length + PROMPTS * PROMPT_TOKENS
    ids, source = _text_ids(model, asked)
    if ids is None:
        low = min(3, model.vocabulary - 1)  # the first ids are mostly special
        ids = [low + (7919 * i * i + 13 * i) % (model.vocabulary - low) for i in range(asked)]
    sequences_NT = torch.tensor(ids[: SEQUENCES * length]).view(SEQUENCES, length)
    rest = ids[SEQUENCES * length : asked]
    prompts = tuple(
        tuple(rest[start : start + PROMPT_TOKENS]) for start in range(0, len(rest), PROMPT_TOKENS)
    )
    return Questions(sequences_NT, prompts, new, source)


def _text_ids(model: Model, count: int) -> tuple[list[int] | None, str]:
    try:
        tokenizer = model.tokenizer()
    except (ConfigError, OSError, ValueError):  # it came without one
        return None, "ids by a formula, for want of a tokenizer"
    text = load_text("builtin", "evaluation").joined
    ids = tokenizer(text[: 12 * count], add_special_tokens=False, verbose=False).input_ids
    if len(ids) < count or max(ids) >= model.vocabulary:
        return None, "ids by a formula: the tokenizer does not fit the text"
    return list(ids[:count]), "the evaluation half of the builtin text"
