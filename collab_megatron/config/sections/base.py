"""What all sections share: frozen, typed, unknown keys refused; and the kinds of numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from collab_megatron.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


UMASKS = ("077", "027", "022", "007", "002", "000")
"""No decimal number that was written by mistake has the digits of one of these."""


def _octal_digits(value: object) -> object:
    """YAML reads an unquoted 077 as a number in octal digits, and an unquoted 0o077 as text."""
    digits = f"{value:03o}" if isinstance(value, int) else str(value).removeprefix("0o").rjust(3, "0")
    return digits if digits in UMASKS else value


Umask = Annotated[Literal["077", "027", "022", "007", "002", "000"], BeforeValidator(_octal_digits)]


class Section(BaseModel):
    """Unknown keys are refused (load.py names the nearest known one); values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """`raw` as this section; `where` is its place in the config. Raises UserError with one sentence."""
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join((where, *(str(part) for part in first["loc"])))
            if first["type"] == "extra_forbidden":
                raise UserError(f"unknown key {place!r}; known keys here: {', '.join(cls.model_fields)}") from None
            raise UserError(
                f"{place!r}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"
            ) from None
