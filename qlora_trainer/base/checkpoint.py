"""A checkpoint folder, looked at before anything heavy starts: is it whole, what is in it?

Only safetensors are read: a pickle (`.bin`, `.pt`) can run code while it loads. The headers of all
shards are compared with the index and with the sizes of the files, so that a truncated download
is named here, all faults in one message, and not met as a crash inside a loader.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.shard_header import TensorHeader, check_header, strange_shards
from qlora_trainer.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder.

    Attributes:
        folder: Where it stands.
        config: Its `config.json`.
        tensors: Name -> header, over all shards.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]

    @property
    def dtype(self) -> torch.dtype:
        """The float type most bytes are in; asking a loader for it leaves them in the file.

        Raises:
            UserError: No tensor is in a type a base can be loaded from (fp8, for example).
        """
        sizes = Counter[str]()
        for header in self.tensors.values():
            if header.dtype in _FLOATS:
                sizes[header.dtype] += header.size_bytes
        if not sizes:
            found = ", ".join(sorted({header.dtype for header in self.tensors.values()}))
            raise UserError(
                f"{self.folder}: its tensors are {found or 'none'}; "
                "a base is loaded from F32, F16 or BF16 weights. Take the model's 16-bit release"
            )
        return _FLOATS[max(sorted(sizes), key=lambda name: sizes[name])]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and all shard headers of a folder.

    Raises:
        UserError: With every fault found: no such folder, `config.json` missing or broken, only
            pickled weights, a shard missing, truncated or not what the index says.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder with config.json and safetensors")
    faults: list[str] = []
    config = _read_json(folder / "config.json", faults)
    if (folder / "generation_config.json").exists():
        _read_json(folder / "generation_config.json", faults)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        faults = [
            "holds an adapter, not a base model; name the model in its adapter_config.json "
            "under base_model_name_or_path"
        ]
        raise UserError.from_faults(f"{folder} cannot be loaded", faults)
    tensors = _read_tensors(folder, faults)
    if faults:
        raise UserError.from_faults(f"{folder} cannot be loaded", faults)
    return Checkpoint(folder, config, tensors)


def read_config_file(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`, without looking at any weights.

    Raises:
        UserError: It is missing or broken.
    """
    faults: list[str] = []
    config = _read_json(folder / "config.json", faults)
    if faults:
        raise UserError.from_faults(f"{folder} cannot be loaded", faults)
    return config


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    """A JSON object; what is wrong with the file goes to `faults`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults.append(f"{path.name} is missing")
    except UnicodeDecodeError as error:
        faults.append(f"{path.name} is not UTF-8 text (byte {error.start})")
    except json.JSONDecodeError as error:
        faults.append(
            f"{path.name} is broken at line {error.lineno}, column {error.colno}: {error.msg}; "
            "fetch it again or mend it there"
        )
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
        faults.append(f"{path.name} cannot be read ({_first_sentence(error)}); fetch it again")
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    else:
        if isinstance(content, dict):
            return content
        faults.append(f"{path.name} must hold a JSON object, not a {type(content).__name__}")
    return {}


def _read_tensors(folder: Path, faults: list[str]) -> dict[str, TensorHeader]:
    index_path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():  # transformers prefers it over an index as well
        shards: dict[str, set[str] | None] = {SINGLE_FILE: None}
    elif index_path.exists():
        shards = _read_index(index_path, faults)
    else:
        faults.append(_no_weights(folder))
        return {}
    tensors: dict[str, TensorHeader] = {}
    for shard, expected in sorted(shards.items()):
        found = check_header(folder / shard, faults)
        if found is None:
            continue
        if expected is not None and (absent := sorted(expected - found.keys())):
            faults.append(
                f"{shard} lacks {len(absent)} tensors the index places in it, first {absent[0]}"
            )
        tensors.update(found)
    return tensors


def _read_index(path: Path, faults: list[str]) -> dict[str, set[str] | None]:
    before = len(faults)
    weight_map = _read_json(path, faults).get("weight_map")
    if len(faults) > before:
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        faults.append(f"{path.name} has no weight_map; fetch it again")
        return {}
    if strange := strange_shards(weight_map):
        faults.extend(f"{path.name} {fault}" for fault in strange)
        return {}
    shards: dict[str, set[str] | None] = {}
    for name, shard in weight_map.items():
        names = shards.setdefault(shard, set())
        assert names is not None
        names.add(name)
    return shards


def _first_sentence(error: Exception) -> str:
    return str(error).partition(";")[0]


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"there is neither {SINGLE_FILE} nor {INDEX_FILE} (found {others[0]}); "
            "name the weights as transformers does"
        )
    if pickles:
        return (
            f"its weights are pickled ({pickles[0]}), and loading a pickle can run any code; take "
            "a revision with safetensors (many hub models have one, also as a pull request: "
            "revision refs/pr/N), or convert it with https://huggingface.co/spaces/safetensors/convert"
        )
    return f"there are no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
