"""Frozen values that plain data become, with errors that name the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketlm.core.errors import ConfigError, nearest


class Strict(BaseModel):
    """A frozen value; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str | None = None) -> Self:
        """Builds the value from plain data.

        Args:
            data: Keys and values, as JSON or YAML give them.
            where: The place to name in an error.

        Returns:
            The validated value.

        Raises:
            ConfigError: On an unknown key or a value out of range.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            # A misspelt key is the cause where another one is missing.
            first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                remedy = nearest(str(first["loc"][-1]), cls.model_fields)
                raise ConfigError(f"unknown option '{key}'.", where=where, remedy=remedy) from None
            if first["type"] == "missing":
                raise ConfigError(f"option '{key}' is missing.", where=where) from None
            message = first["msg"].removeprefix("Value error, ")
            what = f"option '{key}': {message}." if key else f"{message}."
            raise ConfigError(what, where=where) from None
