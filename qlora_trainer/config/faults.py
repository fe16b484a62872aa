"""One line for each thing wrong with a run: where, setting, value, rule, way out.

pydantic finds the faults; its words are for programmers, so those a user cannot act on are
replaced here. For a name that is not known, the setting that was perhaps meant is named.
"""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from qlora_trainer.config.settings import RunConfig, SourceSettings

Place = tuple[str | int, ...]

_SHOWN_CHARACTERS = 80


def setting_of(error: ErrorDetails) -> Place:
    """The place of an error: pydantic's, without its names for the kinds a setting may be of."""
    kind: Any = RunConfig
    place: list[str | int] = []
    for part in error["loc"]:
        kind = _without_none(kind)
        if get_origin(kind) in (Union, UnionType):
            kind = next((k for k in get_args(kind) if _tag(k) == part), None)
        elif part != "[key]":
            place.append(part)
            kind = _inside(kind, part)
    return tuple(place)


def describe(error: ErrorDetails) -> str:
    """The setting, its value, the rule and the way out."""
    place = setting_of(error)
    setting = ".".join(_name(part) for part in place) or "run"
    if error["type"] == "extra_forbidden":
        meant = meant_by(place)
        return f"{setting}: unknown setting{_hint(place, meant) if meant else ''}"
    given = error["input"]
    kind = _kind_at(place)
    is_setting = bool(place) and isinstance(place[-1], str)
    if error["type"] == "missing" or (given is None and is_setting and _is_required(place)):
        return f"{setting}: has to be given"
    rule = _rule(error, kind)
    if given is None and is_setting:
        return f"{setting}: has no value; {rule}; leave it out to take the default"
    shown = "" if isinstance(given, dict) else f" = {_short(given)}"
    return f"{setting}{shown}: {rule}"


def meant_by(place: Place) -> Place | None:
    """The setting an unknown one was perhaps meant to be: by its name elsewhere, or one like it."""
    name = str(place[-1])
    siblings: list[Place] = [(*place[:-1], other) for other in _names(_kind_at(place[:-1]))]
    others: list[Place] = [
        (section, inner)
        for section, field in RunConfig.model_fields.items()
        for inner in _names(field.annotation)
        if place[:-1] != (section,)
    ]
    same = [other for other in others if other[-1] == name]
    near = [*_alike(name, siblings, 0.5), *_alike(name, others, 0.8)]
    near.sort(key=lambda other: _likeness(name, other), reverse=True)
    return next(iter([*same, *near]), None)


def _alike(name: str, places: list[Place], cutoff: float) -> list[Place]:
    return [place for place in places if _likeness(name, place) >= cutoff]


def _likeness(name: str, place: Place) -> float:
    return difflib.SequenceMatcher(None, name, str(place[-1])).ratio()


def _hint(place: Place, meant: Place) -> str:
    whole = ".".join(str(part) for part in meant)
    if meant[:-1] == place[:-1]:
        return f"; did you mean {meant[-1]}?"
    return f"; it belongs at {whole}" if meant[-1] == place[-1] else f"; did you mean {whole}?"


def _rule(error: ErrorDetails, kind: Any) -> str:
    """What a value should be, in words of a run file."""
    given = error["input"]
    simple = isinstance(given, (str, int, float)) and not isinstance(given, bool)
    match error["type"]:
        case "model_type" | "model_attributes_type" if kind is SourceSettings:
            return "should be a path or a mapping with path"
        case "model_type" | "model_attributes_type":
            return "should hold settings, one a line below it"
        case "dict_type":
            return "should be a mapping, such as {name: value}"
        case "list_type":
            return "should be a list" + (f", such as [{given}]" if simple else "")
        case "bool_type":
            return "should be true or false"
        case "invalid_key":
            return "names of settings are text"
        case "string_type" if given is not None and not isinstance(given, (dict, list)):
            return "should be a valid string; put it in quotes"
        case "too_short":
            least = error["ctx"]["min_length"]
            return "must not be empty" if least == 1 else f"should have {least} items"
        case "too_long":
            return f"should have {error['ctx']['max_length']} items"
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _name(part: str | int) -> str:
    return str(part) if str(part).isprintable() else repr(part)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _kind_at(place: Place) -> Any:
    kind: Any = RunConfig
    for part in place:
        kind = _without_none(kind)
        if get_origin(kind) in (Union, UnionType):
            inside = (_inside(branch, part) for branch in get_args(kind))
            kind = next((found for found in inside if found is not None), None)
        else:
            kind = _inside(kind, part)
    return _section(kind)


def _section(kind: Any) -> Any:
    """The section among the kinds a setting may be of, if there is one."""
    kind = _without_none(kind)
    branches = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((found for k in branches if _is_section(found := _bare(k))), kind)


def _inside(kind: Any, part: str | int) -> Any:
    """The kind of one setting of a section, or of one item of a list or mapping."""
    kind = _bare(kind)
    if _is_section(kind):
        field = kind.model_fields.get(part)
        return field.annotation if field else None
    arguments = get_args(kind) if get_origin(kind) in (list, dict) else ()
    return arguments[-1] if arguments else None


def _is_required(place: Place) -> bool:
    section = _kind_at(place[:-1])
    field = section.model_fields.get(place[-1]) if _is_section(section) else None
    return bool(field and field.is_required())


def _without_none(kind: Any) -> Any:
    """`X` for `X | None`."""
    kind = _bare(kind)
    if get_origin(kind) in (Union, UnionType):
        others = [branch for branch in get_args(kind) if branch is not type(None)]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _tag(kind: Any) -> str | None:
    notes = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((note.tag for note in notes if isinstance(note, Tag)), None)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _names(kind: Any) -> Iterator[str]:
    yield from kind.model_fields if _is_section(kind) else ()
