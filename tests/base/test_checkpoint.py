"""Claims of base/checkpoint.py and base/fit.py: a folder that is not whole is named before use."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_trainer.base.checkpoint import open_checkpoint
from qlora_trainer.base.load import BaseSpec, load_base, load_config
from qlora_trainer.errors import UserError

SaveTiny = Callable[..., Path]


@pytest.fixture
def folder(save_tiny: SaveTiny) -> Path:
    """A sound checkpoint of several shards."""
    return save_tiny("llama", AutoModelForCausalLM, max_shard_size="20KB")


def refusal(folder: Path) -> str:
    """The message both the check and the loader give."""
    with pytest.raises(UserError) as checked:
        open_checkpoint(folder)
    with pytest.raises(UserError) as loaded:
        load_base(folder, AutoModelForCausalLM, BaseSpec("nf4"), torch.device("cpu"))
    assert str(loaded.value) == str(checked.value)
    return str(checked.value)


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def test_a_sound_checkpoint_lists_its_tensors(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    assert {n: h.shape for n, h in checkpoint.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert sum(h.size_bytes for h in checkpoint.tensors.values()) == sum(
        t.nbytes for t in tensors.values()
    )
    assert checkpoint.dtype == torch.bfloat16


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_truncated_shard_is_named_with_both_sizes(folder: Path) -> None:
    path = shard(folder, 1)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    text = refusal(folder)
    assert path.name in text
    assert f"({size - 100} bytes) where its header says" in text
    assert f"({size} bytes); fetch it again" in text


def test_missing_empty_and_garbled_shards_are_all_listed_at_once(folder: Path) -> None:
    shard(folder, 0).unlink()
    missing = sorted(
        set(
            json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
        )
    )[0]
    paths = [shard(folder, number) for number in range(4)]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(b"not a tensor file, but long enough for a header")
    header = b'{"x": {"dtype": "F32", '
    paths[2].write_bytes(struct.pack("<Q", len(header)) + header)
    paths[3].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    text = refusal(folder)
    assert "(5 faults)" in text
    assert f"{missing} is missing" in text
    assert f"{paths[0].name} is empty" in text
    assert f"{paths[1].name} has no safetensors header" in text
    assert f"{paths[2].name} has a broken safetensors header" in text
    assert f"{paths[3].name} is only a Git LFS pointer" in text
    assert "git lfs pull" in text


def test_a_shard_from_another_release_is_noticed_by_its_tensors(folder: Path) -> None:
    save_file({"other": torch.zeros(3)}, shard(folder, 0), metadata={"format": "pt"})
    assert "tensors the index places in it" in refusal(folder)


def test_a_broken_configuration_is_located(folder: Path) -> None:
    (folder / "config.json").write_text('{\n  "model_type": "llama",\n  "hidden_size" 64\n}')
    assert "config.json is broken at line 3, column 17" in refusal(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "config.json is not UTF-8 text (byte 7)" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json must hold a JSON object, not a list" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_a_broken_index_is_located(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    assert "model.safetensors.index.json is broken at line 1" in refusal(folder)
    index.write_text("{}")
    assert "has no weight_map" in refusal(folder)


def test_pickled_weights_are_refused_unopened_and_the_way_out_is_said(
    folder: Path, tmp_path: Path
) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.system, (f"touch {tmp_path / 'exploded'}",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    text = refusal(folder)
    assert "pickled (pytorch_model.bin)" in text
    assert "refs/pr/N" in text
    assert not (tmp_path / "exploded").exists()


def test_weights_under_another_name_and_no_weights_at_all(folder: Path) -> None:
    paths = sorted(folder.glob("*.safetensors*"))
    paths[0].rename(folder / "weights.safetensors")
    for path in paths[1:]:
        path.unlink()
    assert "(found weights.safetensors)" in refusal(folder)
    (folder / "weights.safetensors").unlink()
    assert "there are no weights" in refusal(folder)


def test_an_adapter_folder_is_told_from_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a base model" in refusal(tmp_path)


def test_weights_in_fp8_are_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="F8_E4M3"):
        load_base(folder, AutoModelForCausalLM, BaseSpec("nf4"), torch.device("cpu"))


def test_an_unknown_model_type_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UserError, match="'lama' is not known to transformers"):
        load_config(folder)
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="None is not known to transformers"):
        load_config(folder)


def test_a_models_own_code_runs_only_when_trusted(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"model\.trust_remote_code = true"):
        load_config(folder)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_with_a_value_of_the_wrong_type_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(UserError, match=r"(?s)config\.json does not describe a llama.*hidden_size"):
        load_config(folder)


@pytest.mark.parametrize(
    "name",
    ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors",
     "model.bin", "*.safetensors", "..\\stolen.safetensors", ".hidden.safetensors", 7],
)  # fmt: skip
def test_an_index_names_only_safetensors_below_its_folder(folder: Path, name: object) -> None:
    first = shard(folder, 0)
    if isinstance(name, str) and "*" not in name and not name.startswith("/"):
        target = folder / name
        (folder / "a").mkdir()
        target.write_bytes(first.read_bytes())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        tensor: name if file == first.name else file
        for tensor, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    assert f"names {str(name)!r}, which is no safetensors file in its folder" in refusal(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, -4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": 32, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0.0, 8.0]},
        [],
    ],
)
def test_a_header_that_places_a_tensor_elsewhere_is_broken(folder: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    shard(folder, 0).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "has a broken safetensors header" in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_breaks_readers_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read (" in refusal(folder)
