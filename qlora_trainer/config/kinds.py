"""Kinds of values that several settings share, each refusing what could only fail later.

A rule here is told in words a user can act on; pydantic's own are for programmers.
"""

import re
import warnings
from collections.abc import Hashable
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag

from qlora_trainer.units import parse_bytes

Item = TypeVar("Item", bound=Hashable)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def without_doubles(items: list[Item]) -> list[Item]:
    """Refuse a list that names something twice."""
    doubles = {item for item in items if items.count(item) > 1}
    if doubles:
        raise ValueError(f"names {', '.join(sorted(map(repr, doubles)))} more than once")
    return items


def _compiled(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Python is going to read otherwise one day
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise ValueError(f"is not a regular expression: {error}") from None


def _expression(text: str) -> str:
    _compiled(text)
    return text


def _ending(text: str) -> str:
    _compiled(text)
    _compiled(rf"(.*\.)?({text})$")  # as the adapter asks; refuses flags, which must come first
    return text


def _size(text: str) -> str:
    parse_bytes(text)
    return text


Text = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"minLength": 1})]
Names = Annotated[list[Text], AfterValidator(without_doubles)]
Expression = Annotated[Text, AfterValidator(_expression)]
Ending = Annotated[Text, AfterValidator(_ending)]  # of a module's path

Size = Annotated[Text, AfterValidator(_size)]  # such as `1.5 GiB`

_DEVICE = r"^(auto|cpu|cuda(:\d{1,3})?)$"


def _is_device(text: str) -> str:
    if not re.fullmatch(_DEVICE, text, re.ASCII):
        raise ValueError("should be auto, cpu, cuda or, for one of several GPUs, cuda:1")
    return text


Device = Annotated[str, AfterValidator(_is_device), Field(json_schema_extra={"pattern": _DEVICE})]


def _target_kind(value: object) -> str | None:
    return "names" if isinstance(value, list) else "expression" if isinstance(value, str) else None


def _is_target(text: str) -> str:
    if text != "all-linear" and re.sub(r"[\s_-]", "", text.lower()) == "alllinear":
        raise ValueError("did you mean all-linear?")
    return text


TargetModules = Annotated[
    Annotated[Expression, AfterValidator(_is_target), Tag("expression")]
    | Annotated[Names, Field(min_length=1), Tag("names")],
    Discriminator(
        _target_kind,
        custom_error_type="targets",
        custom_error_message="should be all-linear, a list of names, or one regular expression",
    ),
]
