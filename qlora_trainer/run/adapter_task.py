"""What an adapter folder says of its task: the model class, and what became of the configuration.

PEFT names the task (`task_type`) for five of them; for any other the class stands under
`auto_mapping`, in the `config.json` beside the adapter, or in the base's own configuration. The
number of labels is that of the trained head where no configuration beside the adapter tells more.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open

from qlora_trainer.errors import UserError
from qlora_trainer.export.reference import auto_class_name
from qlora_trainer.lora.files import WEIGHTS_NAME
from qlora_trainer.lora.peft_config import CONFIG_NAME, read_json
from qlora_trainer.tasks.catalogue import TASKS

_OF_TASK = {kind.peft_type: kind.auto_class for kind in TASKS.values() if kind.peft_type}
_LABELLED = ("SequenceClassification", "TokenClassification", "ImageClassification")
_LAST_OF_HEAD = ("classifier.weight", "score.weight", "classifier.out_proj.weight",
                 "classifier.1.weight")  # fmt: skip
_OF_LABELS = ("id2label", "label2id", "problem_type")


def adapter_class(folder: Path, base_config: Any) -> Any:
    """The auto class (or class) of the model an adapter is for.

    Args:
        folder: The adapter's.
        base_config: transformers' configuration of its base.

    Raises:
        UserError: Nothing tells the class, or transformers has none of that name.
    """
    settings = read_json(folder / CONFIG_NAME)
    task = settings.get("task_type")
    if task in _OF_TASK:
        return _OF_TASK[task]
    told = [
        (settings.get("auto_mapping") or {}).get("base_model_class"),
        *(_config_beside(folder).get("architectures") or ()),
        *(getattr(base_config, "architectures", None) or ()),
    ]
    architecture = next((str(one) for one in told if one), None)
    if architecture is None:
        raise UserError(
            f"{folder / CONFIG_NAME}: task_type = {task!r} names no model class, and neither "
            "does the base; set task_type to one of " + ", ".join(_OF_TASK)
        )
    name = auto_class_name(architecture)
    found = getattr(transformers, name, None)
    if found is None:
        raise UserError(f"{folder}: transformers {transformers.__version__} has no class {name}")
    return found


def label_settings(folder: Path, model_class: Any, base_config: Any) -> dict[str, Any]:
    """Changes of the base's configuration that go with an adapter's head: its labels.

    Args:
        folder: The adapter's.
        model_class: As `adapter_class` gives it.
        base_config: transformers' configuration of its base.
    """
    if not str(model_class.__name__).endswith(_LABELLED):
        return {}
    beside = _config_beside(folder)
    if beside.get("id2label"):
        names = {int(index): str(label) for index, label in beside["id2label"].items()}
        return {
            "num_labels": len(names), "id2label": names,
            **{key: beside[key] for key in _OF_LABELS[1:] if beside.get(key) is not None},
        }  # fmt: skip
    count = _head_rows(folder)
    if count is None or count == base_config.num_labels:
        return {}
    names = {index: f"LABEL_{index}" for index in range(count)}
    return {
        "num_labels": count, "id2label": names,
        "label2id": {label: index for index, label in names.items()},
    }  # fmt: skip


def _config_beside(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _head_rows(folder: Path) -> int | None:
    """Rows of the trained head; None where the adapter brings none (or is broken: told later)."""
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            heads = [key for key in file.keys() if key.endswith(_LAST_OF_HEAD)]  # noqa: SIM118
            return int(file.get_slice(heads[0]).get_shape()[0]) if heads else None
    except (SafetensorError, OSError):
        return None
