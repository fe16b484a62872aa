"""The tokenizer beside an adapter, in a form that readers older than ours open as well.

transformers 5 writes `tokenizer_config.json` with a class of its own and with a list where
transformers 4, and what is built on it (vLLM, mlx-lm, llama.cpp's converter), takes a table. It
reads the older names as well, to the same tokenizer, so they are what is written.
"""

import json
from pathlib import Path
from typing import Any

from qlora_trainer.base.files import write_text_atomically

_CONFIG_NAME = "tokenizer_config.json"
_OLDER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_OF_THIS_MACHINE = ("is_local", "local_files_only", "backend")  # how and where it was opened


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer or processor for readers of transformers 4 and 5.

    Args:
        tokenizer: With `save_pretrained`; an image processor has no `tokenizer_config.json`.
        folder: To write into.
    """
    tokenizer.save_pretrained(folder)
    path = folder / _CONFIG_NAME
    if path.is_file():
        settings = older_settings(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        write_text_atomically(path, text + "\n")


def older_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer_config.json` as transformers 4 knows it.

    >>> older_settings({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]})
    {'tokenizer_class': 'PreTrainedTokenizerFast', 'additional_special_tokens': ['<x>']}
    """
    older = {name: value for name, value in settings.items() if name not in _OF_THIS_MACHINE}
    named = older.get("tokenizer_class")
    if named in _OLDER_CLASSES:
        older["tokenizer_class"] = _OLDER_CLASSES[named]
    extra = older.get("extra_special_tokens")
    if isinstance(extra, list) and "additional_special_tokens" not in older:
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older
