"""Is a calibration text fit for its purpose? What can be told before a weight is read.

Repetition makes the statistics of few texts look like those of many; special tokens and joints
between unrelated texts are inputs that a model in use sees less often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pocketlm.calibration.runs import run_hashes
from pocketlm.calibration.texts import TextSet

MANY_REPEATED = 0.05  # of the runs of tokens, before a user is warned
MANY_SPECIAL = 0.1  # of the tokens
PARAGRAPH_CHARACTERS = 40  # shorter ones (headings, separators) repeat in any text


class TextHealth(BaseModel):
    """What calibration windows are made of.

    Attributes:
        windows: How many.
        tokens: Of all windows.
        different_tokens: Of the vocabulary, that occur.
        special_tokens: Of all tokens, the BOS that starts windows left out.
        duplicate_windows: That repeat an earlier one.
        repeated_share: Of the runs of 32 tokens, those that occurred before.
        joined_windows: That hold texts from more than one place.
        paragraphs: Of the whole text, of at least 40 characters; 0 where there is no text.
        duplicate_paragraphs: That repeat an earlier one.
        documents: Of the whole text.
        short_documents: That do not fill a window by themselves, by their characters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: int
    tokens: int
    different_tokens: int
    special_tokens: int
    duplicate_windows: int
    repeated_share: float
    joined_windows: int = 0
    paragraphs: int = 0
    duplicate_paragraphs: int = 0
    documents: int = 0
    short_documents: int = 0

    @property
    def special_share(self) -> float:
        """Special tokens of all tokens."""
        return self.special_tokens / self.tokens

    def remarks(self) -> tuple[str, ...]:
        """What a user must be warned of, as sentences."""
        found: list[str] = []
        if self.duplicate_windows:
            found.append(
                f"{self.duplicate_windows} of {self.windows} calibration windows repeat others."
            )
        if self.repeated_share > MANY_REPEATED:
            found.append(
                f"{self.repeated_share:.0%} of what is calibrated on repeats itself "
                f"({self.duplicate_paragraphs} of {self.paragraphs} paragraphs of the text)."
            )
        if self.special_share > MANY_SPECIAL:
            found.append(f"{self.special_share:.0%} of the calibration tokens are special tokens.")
        return tuple(found)

    def facts(self) -> dict[str, str]:
        """The figures in words, by what they are of."""
        facts = {
            "tokens": f"{self.tokens:,}, {self.different_tokens:,} different ones",
            "special tokens": f"{100 * self.special_share:.1f} %",
            "duplicate windows": f"{self.duplicate_windows} of {self.windows}",
            "repeated text": f"{100 * self.repeated_share:.1f} % of runs of 32 tokens",
        }
        if self.paragraphs:
            facts["duplicate paragraphs"] = f"{self.duplicate_paragraphs} of {self.paragraphs:,}"
        if self.documents:
            facts["windows that join texts"] = f"{self.joined_windows} of {self.windows}"
            facts["documents shorter than a window"] = (
                f"{self.short_documents:,} of {self.documents:,}"
            )
        return facts


def token_health(tokens_NT: Tensor, special: Iterable[int], bos: bool = False) -> TextHealth:
    """The health of windows alone.

    Args:
        tokens_NT: int64 ids.
        special: Ids of the tokenizer's special tokens.
        bos: Whether each window starts with a BOS that the tokenizer adds.

    Returns:
        What ids can tell.
    """
    body_NT = tokens_NT[:, 1:] if bos else tokens_NT
    special_ids = torch.tensor(sorted(special), dtype=tokens_NT.dtype)
    runs = run_hashes(tokens_NT)
    different_runs = len(set(runs.tolist()))
    return TextHealth(
        windows=tokens_NT.shape[0],
        tokens=tokens_NT.numel(),
        different_tokens=len(tokens_NT.unique()),
        special_tokens=int(torch.isin(body_NT, special_ids).sum()),
        duplicate_windows=tokens_NT.shape[0] - len(tokens_NT.unique(dim=0)),
        repeated_share=1 - different_runs / len(runs) if len(runs) else 0.0,
    )


def text_health(health: TextHealth, text: TextSet, joined: int, characters: int) -> TextHealth:
    """The same with what the text tells.

    Args:
        health: Of its windows.
        text: Where they come from.
        joined: Windows that hold texts from more than one place.
        characters: About as many as a window holds.

    Returns:
        The whole account.
    """
    paragraphs = Counter(
        paragraph.strip()
        for document in text.documents
        for paragraph in document.split("\n\n")
        if len(paragraph.strip()) >= PARAGRAPH_CHARACTERS
    )
    return health.model_copy(
        update={
            "joined_windows": joined,
            "paragraphs": paragraphs.total(),
            "duplicate_paragraphs": paragraphs.total() - len(paragraphs),
            "documents": len(text.documents),
            "short_documents": sum(len(document) < characters for document in text.documents),
        }
    )
