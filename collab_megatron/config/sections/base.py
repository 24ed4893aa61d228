"""The base class of all sections, and the types of their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from collab_megatron.errors import UserError

LIMIT = 2**31  # of counts, which libraries store in 32 bits

Positive = Annotated[int, Field(gt=0, lt=LIMIT)]
Count = Annotated[int, Field(ge=0, lt=LIMIT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Named = Annotated[str, Field(min_length=1)]
LONGEST_FILE, LONGEST_PATH = 255, 4095  # bytes; Linux's NAME_MAX and PATH_MAX
FolderOrHubName = Annotated[str, Field(min_length=1), AfterValidator(lambda path: short_enough(path))]


UMASKS = ("077", "027", "022", "007", "002", "000")
"""Values that cannot be confused with a decimal number of the same digits."""


def _octal_digits(value: object) -> object:
    """YAML reads an unquoted 077 as an octal number, and an unquoted 0o077 as text."""
    digits = f"{value:03o}" if isinstance(value, int) else str(value).removeprefix("0o").rjust(3, "0")
    return digits if digits in UMASKS else value


Umask = Annotated[Literal["077", "027", "022", "007", "002", "000"], BeforeValidator(_octal_digits)]


class Section(BaseModel):
    """Frozen; an unknown key is an error (explain.py names the nearest known one). Numbers are finite; true and false
    are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_was_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError for values that pydantic would convert to another type."""
        field = cls.model_fields[info.field_name or ""]
        taken = frozenset(_kinds(field.annotation))
        if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in taken):
            return value  # the inner section checks its own values
        for part in _parts(value):
            if isinstance(part, bool):
                _refuse_bool(part, taken)
            elif isinstance(part, str | Path):
                _refuse_text(str(part), part, taken)
        return value

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """`raw` as this section; `where` is its key in the config. Raises UserError with one sentence."""
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


def _refuse_bool(value: bool, taken: frozenset[Any]) -> None:
    if bool in taken or Any in taken:
        return
    given = "true" if value else "false"
    if int in taken or float in taken:
        raise ValueError(f"{given} is not a number")
    if choices := sorted(kind for kind in taken if isinstance(kind, str)):
        named = ", ".join(map(repr, choices))
        raise ValueError(
            f"{given} is not one of {named}: YAML reads yes, no, on and off as true and false, so quote it"
        )


def _refuse_text(text: str, part: str | Path, taken: frozenset[Any]) -> None:
    if "\0" in text:
        raise ValueError("it contains a NUL character: remove it")
    if Path in taken and str not in taken:
        if part == "":
            raise ValueError("it is empty: name a file or folder, or leave it out")
        short_enough(text)


def short_enough(path: str) -> str:
    """`path`, if it is short enough for a file system. Raises ValueError."""
    if len(path.encode()) > LONGEST_PATH or any(len(name.encode()) > LONGEST_FILE for name in path.split("/")):
        raise ValueError(f"it is too long for a path: use names of at most {LONGEST_FILE} bytes, {LONGEST_PATH} in all")
    return path


def _parts(value: Any) -> Iterable[Any]:
    """The value itself, or the values in a list or mapping."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Parts of an annotation: types, and the values of a Literal, with bool for true and false."""
    if get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif get_origin(annotation) is Literal:
        yield from (bool if isinstance(choice, bool) else choice for choice in get_args(annotation))
    elif inner := get_args(annotation):
        for part in inner:
            yield from _kinds(part)
    else:
        yield annotation
