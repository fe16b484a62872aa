"""Everything beside the weights: configuration, tokenizer, chat template, code, licence.

What the base's folder has and the weights' reader or the tokenizer may need goes along; the
tokenizer of the adapter's folder, where there is one, comes over it, since training may have given
it tokens or a chat template. `config.json` is the base's own text with only what must change
changed: no quantization, the dtype written, the model class, the vocabulary.

A link that leads out of its folder is not followed: a folder from elsewhere could have any file of
this machine copied into what is published.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from qlora_trainer.base.checkpoint import read_config_file
from qlora_trainer.errors import UserError

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
    ".ot", ".onnx_data", ".tflite", ".index.json",
)  # fmt: skip
_REWRITTEN = ("config.json", "README.md", "adapter_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "target_vocab.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "additional_chat_templates",
)  # fmt: skip
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_DTYPE_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


def companions(base: Path, adapter: Path | None) -> dict[str, Path]:
    """What goes along: name in the export -> the file or folder it is copied from.

    Raises:
        UserError: Some of it is a link that leads out of its folder.
    """
    chosen: dict[str, Path] = {}
    for entry in sorted(base.iterdir()):
        left = entry.name.endswith(_WEIGHTS) or entry.name in _REWRITTEN
        left = left or entry.name.startswith(".")
        if not left and (entry.is_file() or entry.name in _TOKENIZER):
            chosen[entry.name] = entry
    if adapter is not None:
        for name in _TOKENIZER:
            if (adapter / name).exists():
                chosen[name] = adapter / name
    _refuse_links_away(chosen.values())
    return chosen


def _refuse_links_away(chosen: Iterable[Path]) -> None:
    """Refuse links out of the folder they stand in; a hub cache's lead into the cache itself."""
    cache = Path(constants.HF_HUB_CACHE).resolve()
    faults = []
    for source in chosen:
        home = source.parent.resolve()
        # models--NAME/snapshots/COMMIT/FILE -> models--NAME/blobs/HASH, wherever the cache stands
        places = (home, cache, *([home.parents[1]] if home.parent.name == "snapshots" else []))
        faults += [
            f"{file}: leads to {target}; put a copy in its place if it belongs to the model"
            for file in (source, *(source.rglob("*") if source.is_dir() else ()))
            if not any((target := file.resolve()).is_relative_to(place) for place in places)
        ]
    if faults:
        raise UserError.from_faults("links out of the folder, which an export won't copy", faults)


def companion_bytes(base: Path, adapter: Path | None) -> int:
    """Disk that `copy_companions` will take."""
    return sum(
        file.stat().st_size
        for source in companions(base, adapter).values()
        for file in (source.rglob("*") if source.is_dir() else (source,))
        if file.is_file()
    )


def copy_companions(base: Path, adapter: Path | None, out: Path) -> None:
    """Copy what goes along."""
    for name, source in companions(base, adapter).items():
        if source.is_dir():
            shutil.copytree(source, out / name)
        else:
            shutil.copyfile(source, out / name)  # follows the links of a hub cache


def copy_tokenizer(base: Path | None, adapter: Path, out: Path) -> None:
    """Copy the tokenizer's files alone: the base's, and over them those beside the adapter."""
    for folder in (base, adapter):
        for name in _TOKENIZER:
            source = None if folder is None else folder / name
            if source is not None and source.is_file():
                _refuse_links_away([source])
                shutil.copyfile(source, out / name)


def write_config(
    base: Path,
    out: Path,
    *,
    architecture: str,
    dtype: torch.dtype,
    changes: Mapping[str, Any],
) -> None:
    """Write `config.json`.

    Args:
        base: Folder whose configuration is taken.
        out: Folder to write to.
        architecture: Name of the model class the weights are for.
        dtype: Of the weights.
        changes: Further settings; those of the language part of a composed model go there.
    """
    config = read_config_file(base)
    config.pop("quantization_config", None)
    config["architectures"] = [architecture]
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = _DTYPE_NAMES[dtype]
    config.setdefault("dtype", _DTYPE_NAMES[dtype])
    # Readers older than transformers 5 know the older name only.
    config.setdefault("torch_dtype", _DTYPE_NAMES[dtype])
    text = config.get("text_config")
    for key, value in changes.items():
        if isinstance(text, dict) and key in ("vocab_size", "tie_word_embeddings"):
            text[key] = value
        if not isinstance(text, dict) or key != "vocab_size" or key in config:
            config[key] = value
    content = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "config.json").write_text(content + "\n", encoding="utf-8")


def add_stop_ids(folder: Path, stop_ids: Sequence[int]) -> None:
    """Let whoever generates with an export end answers where training taught them to end.

    `generation_config.json` gets them beside the base's own; without that file readers take the
    special tokens of `config.json`, and so does the one written here.

    Args:
        folder: Of the export, its `config.json` and what goes along already there.
        stop_ids: Token ids; none changes nothing.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:
        config = read_config_file(folder)
        text = config.get("text_config") or config
        settings = {name: text[name] for name in _SPECIAL if text.get(name) is not None}
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    missing = [token for token in stop_ids if token not in known]
    if missing:
        settings["eos_token_id"] = [*known, *missing]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
