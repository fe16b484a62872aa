"""Tiny bases and adapters, made once."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.export.source import ExportSource
from tests.export import tiny


class Bench:
    """A folder of tiny bases and adapters, each made when first asked for; never write to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str = "llama", **settings: Any) -> Path:
        return self._made(f"base-{family}-{settings}", tiny.make_base, family, **settings)

    def adapter(self, base: Path, family: str = "llama", **settings: Any) -> Path:
        settings = {"target_modules": "all-linear", **settings}
        name = f"adapter-{base.name}-{settings}"

        def make(folder: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's advice on tied weights
                tiny.make_adapter(base, folder, family, **settings)

        return self._made(name, make)

    def source(self, family: str = "llama", **settings: Any) -> ExportSource:
        base = self.base(family)
        return ExportSource(
            base, self.adapter(base, family, **settings), tiny.CLASSES[family],
            BaseSpec("nf4", compute_dtype=torch.float32), str(base),
        )  # fmt: skip

    def _made(self, name: str, make: Any, *args: Any, **settings: Any) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:180]
        folder = self.folder / safe
        if not folder.exists():
            make(folder, *args, **settings)
        return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("export"))
