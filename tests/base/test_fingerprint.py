"""Two bases have one fingerprint exactly when an adapter of the one fits the other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.base.fingerprint import base_fingerprint
from qlora_trainer.errors import UserError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layer.{n}": torch.randn(64, 64, generator=generator) for n in range(4)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_copy_elsewhere_with_other_companions_is_the_same_base(
    base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "README.md").write_text("a copy")
    (copy / "config.json").write_text(
        json.dumps({"hidden_size": 8, "model_type": "llama"}, indent=2)
    )
    assert base_fingerprint(copy) == base_fingerprint(base)


@pytest.mark.parametrize("name", [f"layer.{n}" for n in range(4)])
def test_one_tensor_of_other_values_is_another_base(base: Path, name: str) -> None:
    before = base_fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, base / "model.safetensors")
    assert base_fingerprint(base) != before


def test_another_configuration_is_another_base(base: Path) -> None:
    before = base_fingerprint(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 16}))
    assert base_fingerprint(base) != before


def test_a_truncated_checkpoint_is_named(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors has .* bytes"):
        base_fingerprint(base)
