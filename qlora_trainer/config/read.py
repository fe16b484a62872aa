"""Read a run file and say all that is wrong with it at once, each fault with its line.

YAML is composed into nodes first, so that every setting keeps the line it was written on and a
key written twice is a fault instead of a silent winner. `--set a.b=value` goes through the same
checks under its own name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_trainer.config.checks import contradictions
from qlora_trainer.config.faults import Place, describe, meant_by, setting_of
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for `1e-4`, which people write and YAML 1.1 reads as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

_MOST_ENTRIES = 10_000  # a few lines of YAML can repeat themselves into billions
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


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
    faults: list[str] = []
    overridden: list[Place] = []
    for override in overrides:
        try:
            overridden.append(_apply_override(merged, override))
        except UserError as error:
            faults.append(str(error))
    written: Mapping[Place, int] = lines or {}

    def where(place: Place) -> str:
        if any(place[: len(key)] == key for key in overridden):
            return "--set"
        known = (place[:depth] for depth in range(len(place), 0, -1) if place[:depth] in written)
        nearest = next(known, None)
        return f"{name}:{written[nearest]}" if nearest else name

    config, wrong = _validate(merged)
    faults += [f"{where(setting_of(error))}: {describe(error)}" for error in wrong]
    checked = config or _mended(merged, wrong)
    spoilt = _spoilt(wrong)
    for found in contradictions(checked) if checked else ():
        if not any(setting[: len(part)] == part for setting in found.settings for part in spoilt):
            faults.append(f"{where(found.settings[0])}: {found.message}")
    if config is None or faults:
        raise UserError.from_faults(f"{name} is not a run that can start", faults)
    return config


def _validate(values: Any) -> tuple[RunConfig | None, list[ErrorDetails]]:
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        return None, error.errors()


def _spoilt(wrong: Iterable[ErrorDetails]) -> set[Place]:
    """The faulty settings, and for each unknown one the setting that was perhaps meant."""
    spoilt = {setting_of(error) for error in wrong}
    meant = {meant_by(setting_of(e)) for e in wrong if e["type"] == "extra_forbidden"}
    return {place[:2] for place in spoilt | {place for place in meant if place}}


def _mended(values: Any, wrong: Iterable[ErrorDetails]) -> RunConfig | None:
    """The run with the faulty settings at their defaults, to see what else is wrong with it."""
    mended = _copied(values)
    for place in {setting_of(error)[:2] for error in wrong}:
        section = mended if len(place) < 2 else mended.get(place[0])
        if isinstance(section, dict) and place:
            section.pop(place[-1], None)
    for section, name in (("model", "source"), ("data", "train")):
        if mended.get(section) is None:
            mended[section] = {}
        mended[section].setdefault(name, "to be given")
    return _validate(mended)[0]


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
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {_one_line(error)}") from None
    if doubles:
        raise UserError.from_faults(f"{path}: settings written twice", doubles)
    return values, lines


def _one_line(error: Exception) -> str:
    """What PyYAML says, without the piece of the file it draws below."""
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return " ".join(str(said).split())


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterable[str]:
    """Note the line of every key and list item; yield keys that stand twice in one mapping."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*place, index)
            _note(lines, here, item.start_mark.line + 1)
            yield from _walk(item, here, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*place, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            yield f"line {line}: {'.'.join(map(str, here))} stands on line {lines[here]} already"
        _note(lines, here, line)
        yield from _walk(value, here, lines)


def _note(lines: dict[Place, int], place: Place, line: int) -> None:
    lines[place] = line
    if len(lines) > _MOST_ENTRIES:
        raise ValueError(f"more than {_MOST_ENTRIES} entries, counting what aliases (*) repeat")


def _apply_override(values: dict[str, Any], override: str) -> Place:
    """Put one `a.b=value` into the values and return the place of what was not there before.

    Raises:
        UserError: The text is not of that form, or runs through a setting that holds no others.
    """
    key, equals, text = override.partition("=")
    place: Place = tuple(part.strip() for part in key.split("."))
    if not equals or not all(place):
        raise UserError(f"--set {override}: write section.setting=value")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        doubles = list(_walk(node, place, {})) if node else []
        value = loader.construct_document(node) if node else None
    except _YAML_ERRORS as error:
        raise UserError(f"--set {override}: not valid YAML: {_one_line(error)}") from None
    if doubles:
        raise UserError(f"--set {override}: a setting is written twice")
    target: Any = values
    new = len(place)
    for depth, part in enumerate(place[:-1], start=1):
        if target.get(part) is None:
            target[part], new = {}, min(new, depth)
        target = target[part]
        if not isinstance(target, dict):
            above = ".".join(map(str, place[:depth]))
            raise UserError(f"--set {override}: {above} holds no other settings")
    target[place[-1]] = value
    return place[:new]
