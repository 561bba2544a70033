"""Data with roles becomes text through the model's own chat template.

Understands ``messages`` (role, content) and ``conversations`` (from, value) records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketlm.calibration.tokens import Tokenizer
from pocketlm.core.errors import CalibrationError

ROLE_KEYS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def chat_text(record: Mapping[str, Any], tokenizer: Tokenizer | None, where: str) -> str:
    """Renders one record that has roles.

    Args:
        record: Has the key ``messages`` or ``conversations``.
        tokenizer: The model's; its chat template is used.
        where: File and line, for errors.

    Returns:
        The conversation as the model's template spells it.

    Raises:
        CalibrationError: Without a chat template, or if a turn lacks its role or content.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise CalibrationError(
            "the data has roles, but there is no chat template to render them with.",
            where=where,
            remedy="Use a model whose tokenizer has a chat template, or plain text.",
        )
    key = next(key for key in ROLE_KEYS if key in record)
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise CalibrationError(f"'{key}' is not a list of turns.", where=where)
    try:
        rendered = tokenizer.apply_chat_template(
            [_turn(turn, where) for turn in turns], tokenize=False
        )
    except CalibrationError:
        raise
    except Exception as error:  # a template is a program of the model's author: any error is theirs
        raise CalibrationError(
            f"the chat template refuses this conversation: {error}",
            where=where,
            remedy="Check the order of the roles.",
        ) from error
    return str(rendered)


def _turn(turn: Any, where: str) -> dict[str, str]:
    if isinstance(turn, dict):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    found = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
    raise CalibrationError(
        f"a turn lacks its role or its text (found: {found}).",
        where=where,
        remedy="Turns need 'role' and 'content', or 'from' and 'value'.",
    )
