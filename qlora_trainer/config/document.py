"""What people read about settings, made from their declarations: `qlora init`, `qlora schema`.

Nothing about a setting is written a second time, so the commented run file cannot drift from
what the program accepts.
"""

import json
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.config.tasks import TaskName

_EXAMPLES = {
    ("model", "source"): "path/to/model",
    ("data", "train"): "path/to/train.jsonl",
}


def json_schema() -> str:
    """The JSON Schema of a run file, for editors and other programs."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def commented_run_file(
    examples: dict[tuple[str, str], str] | None = None, *, task: TaskName = "causal-lm"
) -> str:
    """A run file with every setting: what must be given written out, every default commented.

    Args:
        examples: Values for settings, by (section, name), written out instead of the defaults.
        task: What is learned.
    """
    chosen = {**_EXAMPLES, **(examples or {})}
    lines = ["# A run file of qlora_trainer. Commented lines show the defaults.", ""]
    for section, field in RunConfig.model_fields.items():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            value = task if section == "task" else field.default
            lines += [_line(section, value, field, indent=""), ""]
            continue
        given = [key for key in chosen if key[0] == section]
        lines += [f"{'' if given else '# '}{section}:  # {field.description}"]
        for name, setting in inner.model_fields.items():
            value = chosen.get((section, name), setting.get_default())
            is_given = (section, name) in chosen
            lines += [_line(name, value, setting, indent="  " if is_given else "#   ")]
        lines += [""]
    return "\n".join(lines)


def settings_table() -> list[tuple[str, str, str]]:
    """Every setting as (name, default, help), in the order of the run file."""
    rows = []
    for section, field in RunConfig.model_fields.items():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            rows += [(section, _yaml(field.default), field.description or "")]
            continue
        for name, setting in inner.model_fields.items():
            default = "(required)" if setting.is_required() else _yaml(setting.get_default())
            rows += [(f"{section}.{name}", default, setting.description or "")]
    return rows


def _line(name: str, value: Any, field: FieldInfo, indent: str) -> str:
    text = f"{indent}{name}: {_yaml(value)}"
    return f"{text:<44}  # {field.description}"


def _yaml(value: Any) -> str:
    """One value as it is written in a run file, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
