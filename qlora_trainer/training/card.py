"""The model card beside an adapter: what it is, how it was made, how to load it.

Only facts of the run go in; no paths of the user's machine beyond the names they chose to
publish under, no environment variables, no tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.tasks.catalogue import TASKS

_PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
}

# An adapter is to load at once where it was made, so its configuration tells the whole path there.
_LOCAL_BASE = """\
`adapter_config.json` names the base by its folder on the machine that trained the adapter.
Elsewhere name your own copy as above; before publishing, put its hub name under
`base_model_name_or_path`.
"""


def model_card(
    *,
    base_source: str,
    revision: str | None,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    rows: Mapping[str, int],
    versions: Mapping[str, str],
) -> str:
    """Write the card as Markdown with the metadata block that model hubs read.

    Args:
        base_source: The base as the user named it; of a local folder only its name is told.
        revision: Commit of a hub model.
        settings: Of the run; its task, and the sections `adapter` and `train`, are shown.
        metrics: Name and value of each final figure.
        rows: Rows per split.
        versions: Package versions.
    """
    is_local = Path(base_source).is_dir()
    base = Path(base_source).name if is_local else base_source
    header = yaml.safe_dump(
        {
            "base_model": base,
            "library_name": "peft",
            "pipeline_tag": _PIPELINE_TAGS[settings["task"]],
            "tags": ["qlora", "lora", "nf4", "qlora_trainer"],
        },
        sort_keys=False,
    )
    pinned = f" at `{revision}`" if revision else ""
    lines = [
        f"---\n{header}---\n",
        f"# Adapter for {base}\n",
        f"A low-rank adapter trained on `{base}`{pinned} by qlora_trainer.\n",
        "## Result\n",
        *_table(("figure", "value"), {name: f"{value:.4f}" for name, value in metrics.items()}),
        "## Data\n",
        *_table(("split", "rows"), rows),
        "## Settings\n",
        "```yaml",
        yaml.safe_dump(
            {section: settings[section] for section in ("adapter", "train") if section in settings},
            sort_keys=False,
        ).rstrip(),
        "```\n",
        "## Use\n",
        "```python",
        *_use(settings["task"], f"path/to/{base}" if is_local else base),
        "```\n",
        _LOCAL_BASE if is_local else "",
        "## Made with\n",
        *_table(("package", "version"), versions),
    ]
    return "\n".join(lines)


def _use(task: str, base: str) -> list[str]:
    """Python that loads base and adapter; a task with labels finds them beside the adapter."""
    kind = TASKS[task]
    model_class = kind.auto_class.__name__
    labelled = task.endswith("-classification")
    classes = f"AutoConfig, {model_class}" if labelled else model_class
    return [
        "from peft import PeftModel",
        f"from transformers import {classes}",
        *(
            ['config = AutoConfig.from_pretrained("path/to/this/folder")  # knows the labels']
            if labelled
            else []
        ),
        f'base = {model_class}.from_pretrained("{base}"{", config=config" if labelled else ""})',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *body, ""]
