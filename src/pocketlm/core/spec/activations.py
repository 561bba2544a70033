"""How the inputs of linears are rounded while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from pocketlm.core.spec.strict import Strict


class ActivationSpec(Strict):
    """How a linear's inputs are rounded while the model runs: x ≈ scale · (code - zero).

    Attributes:
        type: "int": codes from -2^(bits-1) to 2^(bits-1)-1; "float": E4M3.
        bits: Of a code: 4 to 8 for "int", 8 for "float".
        symmetric: Whether zero is 0; "float" always is.
        granularity: What shares a scale: a "token" (ZeroQuant, arXiv:2206.01861, section 4.1), a
            "group" of neighbouring columns of a token, or the whole "tensor".
        group_size: Columns of a group.
        dynamic: Whether scales are found anew for every input; "tensor" alone may be static, with
            a scale from calibration, and always is: else a token would depend on its neighbours.
        outliers: From which magnitude a value is not rounded, of "int" per token (LLM.int8(),
            arXiv:2208.07339, which takes 6); None: all are rounded.
    """

    type: Literal["int", "float"] = "int"
    bits: int = Field(default=8, ge=4, le=8)
    symmetric: bool = True
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: int | None = Field(default=None, ge=8)
    dynamic: bool = True
    outliers: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _stand_together(self) -> Self:
        if self.type == "float" and (self.bits != 8 or not self.symmetric):
            raise ValueError("'float' inputs have 8 bits and no zero points")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size is given with granularity 'group', and only with it")
        if self.dynamic == (self.granularity == "tensor"):
            kind = "static" if self.granularity == "tensor" else "dynamic"
            raise ValueError(f"scales per {self.granularity} are {kind}")
        if self.outliers is not None and (self.type, self.granularity) != ("int", "token"):
            raise ValueError("outliers are kept apart from 'int' codes with granularity 'token'")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out outliers where there are none: files written before stay as they are."""
        return {k: v for k, v in plain(self).items() if k != "outliers" or v is not None}

    @property
    def name(self) -> str:
        """A short name, such as ``int8-token``, ``int8-tensor-asymmetric`` or ``float8-group``."""
        kind = f"{self.type}{self.bits}-{self.granularity}"
        kind = kind if self.symmetric else f"{kind}-asymmetric"
        return kind if self.outliers is None else f"{kind}-outliers"

    @property
    def stored_bits(self) -> int:
        """Bits that a linear's scale and zero point take on disk; 0 where scales are dynamic."""
        if self.dynamic:
            return 0
        return 32 + (0 if self.symmetric else 8)
