"""What is exported: a base and an adapter for it, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_trainer.base.load import BaseSpec


@dataclass(frozen=True)
class ExportSource:
    """A base and an adapter for it.

    Attributes:
        base_folder: `config.json` and safetensors.
        adapter_folder: An adapter in PEFT's format.
        model_class: The transformers class or auto class of the task.
        spec: How training held the base.
        base_source: What the user calls the base: a hub name or a folder.
        revision: Commit of a hub model.
        config_changes: Settings of the model configuration the task decided.
        notes: What the report shall say of how the adapter came to be.
        stop_ids: Tokens at which training taught answers to end.
    """

    base_folder: Path
    adapter_folder: Path
    model_class: Any
    spec: BaseSpec
    base_source: str
    revision: str | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    @property
    def folders(self) -> tuple[Path, Path]:
        """What is read and must stay untouched."""
        return self.base_folder, self.adapter_folder


def last_part(source: str) -> str:
    """What a base is called wherever it stands: the last part of its hub name or its path.

    >>> last_part("HuggingFaceTB/SmolLM2-135M/")
    'SmolLM2-135M'
    """
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2]
