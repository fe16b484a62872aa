"""Read a run file and say all that is wrong with it at once, each fault with its line.

YAML is composed into nodes first, so that every setting keeps the line it was written on and a
key written twice is a fault instead of a silent winner. `--set a.b=value` goes through the same
checks under its own name.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_trainer.config.checks import cross_field_faults
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError

Place = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for `1e-4`, which people write and YAML 1.1 reads as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a run file.

    Args:
        path: The YAML file.
        overrides: `section.setting=value` each, as given to `--set`; the value is YAML.

    Raises:
        UserError: The file cannot be read, or with every fault found in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; `qlora init {path}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    values, lines = _parse(text, path)
    return check_values(values, overrides=overrides, lines=lines, name=str(path))


def check_values(
    values: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    lines: Mapping[Place, int] | None = None,
    name: str = "run",
) -> RunConfig:
    """Check a run given as plain values, as the Python API does.

    Raises:
        UserError: With every fault found.
    """
    merged: dict[str, Any] = _copied(values)
    overridden = {_apply_override(merged, override) for override in overrides}
    written: Mapping[Place, int] = lines or {}

    def place_name(place: Place) -> str:
        if any(place[: len(key)] == key for key in overridden):
            return "--set"
        known = (place[:depth] for depth in range(len(place), 0, -1) if place[:depth] in written)
        nearest = next(known, None)
        return f"{name}:{written[nearest]}" if nearest else name

    faults: list[str] = []
    config = None
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        faults += [_describe(detail, place_name) for detail in _without_echoes(error.errors())]
    if config is not None:
        faults += [f"{place_name(place)}: {fault}" for place, fault in cross_field_faults(config)]
    if config is None or faults:
        raise UserError.from_faults(f"{name} is not a run that can start", faults)
    return config


def _copied(value: Any) -> Any:
    """Copy nested mappings and lists, so that overrides never reach the caller's values."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """Turn YAML text into values and the line of each setting."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: is empty; `qlora init` writes a run file to start from")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: a run file is a mapping of sections, such as `model:`")
        lines: dict[Place, int] = {}
        doubles = list(_walk(node, (), lines))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if doubles:
        raise UserError.from_faults(f"{path}: settings written twice", doubles)
    return values, lines


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterable[str]:
    """Note the line of every key and list item; yield keys that stand twice in one mapping."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*place, index)
            lines[here] = item.start_mark.line + 1
            yield from _walk(item, here, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*place, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            yield f"line {line}: {'.'.join(map(str, here))} stands on line {lines[here]} already"
        lines[here] = line
        yield from _walk(value, here, lines)


def _apply_override(values: dict[str, Any], override: str) -> Place:
    """Put one `a.b=value` into the values and return its place.

    Raises:
        UserError: The text is not of that form, or runs through a setting that holds no others.
    """
    key, equals, text = override.partition("=")
    place = tuple(key.strip().split("."))
    if not equals or not all(place):
        raise UserError(f"--set {override}: write section.setting=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from None
    target: Any = values
    for depth, part in enumerate(place[:-1]):
        target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise UserError(
                f"--set {override}: {'.'.join(place[: depth + 1])} holds no other settings"
            )
    target[place[-1]] = value
    return place


def _without_echoes(errors: Sequence[ErrorDetails]) -> Iterable[ErrorDetails]:
    """Keep, where every branch of a union failed, the branch that came furthest."""
    best: dict[Place, ErrorDetails] = {}
    for error in errors:
        place = _place(error)
        if place not in best or _reached(error) > _reached(best[place]):
            best[place] = error
    return best.values()


def _reached(error: ErrorDetails) -> tuple[int, bool]:
    """How far a branch of a union came: depth, then whether it got as far as our own rules."""
    return len(error["loc"]), error["type"] == "value_error"


def _place(error: ErrorDetails) -> Place:
    """The setting of an error: its location without pydantic's names for branches of a union."""
    model: Any = RunConfig
    place: list[str | int] = []
    for part in error["loc"]:
        fields = getattr(model, "model_fields", None)
        if fields is None and isinstance(part, str):
            break
        place.append(part)
        if isinstance(part, int):
            continue
        model = _inner_model(fields[part].annotation) if fields and part in fields else None
    return tuple(place)


def _inner_model(annotation: Any) -> Any:
    """The section inside an annotation such as `list[SourceSettings]`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is list:
        return _inner_model(get_args(annotation)[0])
    return None


def _describe(error: ErrorDetails, place_name: Callable[[Place], str]) -> str:
    """One line for one fault: where, setting, value, rule and, for a typo, the nearest name."""
    place = _place(error)
    where = f"{place_name(place)}: {'.'.join(str(part) for part in place) or 'run'}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_hint(place)}"
    if error["type"] == "missing":
        return f"{where}: has to be given"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    inner = [str(part) for part in error["loc"][len(place) + 1 :]]
    shown = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    return f"{'.'.join([where, *inner])}{shown}: {message}"


def _hint(place: Place) -> str:
    """What an unknown setting was perhaps meant to be: the same name elsewhere, or one like it."""
    name = str(place[-1])
    elsewhere = [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        if name in getattr(field.annotation, "model_fields", {})
    ]
    if elsewhere:
        return f"; it belongs at {elsewhere[0]}"
    model: Any = RunConfig
    for part in place[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = _inner_model(field.annotation) if field else model
    near = difflib.get_close_matches(name, getattr(model, "model_fields", {}), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
