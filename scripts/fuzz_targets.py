"""What strangers may hand us, each as bytes: one function per kind of file, text or command line.

A target feeds one input to the product as a user would and swallows only the errors made for users.
Anything else that comes out is a fault of ours. `tests/test_fuzz.py` (hypothesis) and `fuzz.py`
(atheris) drive the same functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuzz_seeds import SEEDS
from transformers import PreTrainedTokenizerFast

from qlora_trainer.base.checkpoint import open_checkpoint
from qlora_trainer.base.fingerprint import base_fingerprint
from qlora_trainer.base.fit import load_config
from qlora_trainer.cli.app import app
from qlora_trainer.config.read import check_values, read_run_file
from qlora_trainer.data.answers import recognise_questions, to_asked
from qlora_trainer.data.faults import FaultLog, RowError, TooManyFaults
from qlora_trainer.data.files import read_file
from qlora_trainer.data.formats import FORMATS, recognise_format, to_shape
from qlora_trainer.data.labelled_texts import check_record, find_problem, recognise_labelled_texts
from qlora_trainer.data.messages import Chat
from qlora_trainer.data.pairs import PAIR_FORMATS, recognise_pair_format, to_pair
from qlora_trainer.data.tagged_words import recognise_tagged_words, to_tagged_words
from qlora_trainer.data.template import ChatTemplate
from qlora_trainer.errors import UserError
from qlora_trainer.export.checkpoint import read_header
from qlora_trainer.export.gguf_file import write_gguf
from qlora_trainer.lora.files import read_adapter_config, read_tensors
from qlora_trainer.training.environment import base_trained_on
from qlora_trainer.training.log import cut_metrics, read_metrics
from qlora_trainer.training.state import newest_good_state

_EMBEDDING = json.dumps(
    {"model.embed_tokens.weight": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]}}
).encode()
FOR_USERS = (UserError, RowError, TooManyFaults)
_STATE_FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json")
_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye."},
]
Target = Callable[[bytes, Path, Any], None]


def _written(content: bytes, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def run_file(content: bytes, place: Path, _: Any) -> None:
    """A run file."""
    read_run_file(_written(content, place / "run.yaml"))


def override(content: bytes, place: Path, _: Any) -> None:
    """What follows `--set`."""
    values = {"model": {"source": "m"}, "data": {"train": "d.jsonl"}}
    check_values(values, overrides=[content.decode("utf-8", "replace")])


def rows_of(suffix: str) -> Target:
    """Rows in files of one type, read and brought to every shape a task may want."""

    def read(content: bytes, place: Path, _: Any) -> None:
        faults = FaultLog()
        rows = list(read_file(_written(content, place / f"rows{suffix}"), faults))
        records = [row.record for row in rows[:20]]
        if records:
            shape_records(records)

    return read


def shape_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Take records for each kind of task in turn."""
    recognise: tuple[Callable[[], Any], ...] = (
        lambda: recognise_format(records, {}),
        lambda: recognise_pair_format(records, {}),
        lambda: recognise_labelled_texts(records, {}, labelled=True),
        lambda: recognise_tagged_words(records, {}),
        lambda: recognise_questions(records, {}),
        lambda: find_problem(records),
    )
    for ask in recognise:
        with contextlib.suppress(*FOR_USERS):
            ask()
    for record in records:
        takes: list[Callable[[Mapping[str, Any]], Any]] = [
            lambda r: check_record(r, labelled=True), to_tagged_words, to_asked,
            *(lambda r, f=f: to_shape(r, f, as_chat=True) for f in FORMATS),
            *(lambda r, f=f: to_shape(r, f, as_chat=False) for f in FORMATS),
            *(lambda r, f=f: to_pair(r, f) for f in PAIR_FORMATS),
        ]  # fmt: skip
        for take in takes:
            with contextlib.suppress(*FOR_USERS):
                take(record)


def template(content: bytes, _: Path, tokenizer: Any) -> None:
    """A chat template."""
    made = ChatTemplate(tokenizer, content.decode("utf-8", "replace"))
    for loss_on in ("assistant", "last", "all"):
        with contextlib.suppress(*FOR_USERS):
            made.render([dict(message) for message in _CHAT], None, loss_on)
    made.holds_control(Chat([dict(message) for message in _CHAT]))


def adapter_config(content: bytes, place: Path, _: Any) -> None:
    """`adapter_config.json`."""
    read_adapter_config(_written(content, place / "adapter_config.json").parent)


def adapter_weights(content: bytes, place: Path, _: Any) -> None:
    """`adapter_model.safetensors`."""
    read_tensors(_written(content, place / "adapter_model.safetensors").parent)


def model_config(content: bytes, place: Path, _: Any) -> None:
    """`config.json`."""
    load_config(_written(content, place / "config.json").parent)


def shard(content: bytes, place: Path, _: Any) -> None:
    """`model.safetensors`, looked at, told from another, and mapped as an export does."""
    _written(b'{"model_type": "llama"}', place / "config.json")
    file = _written(content, place / "model.safetensors")
    with contextlib.suppress(UserError):
        open_checkpoint(place).dtype  # noqa: B018 - it may refuse
    base_fingerprint(place)
    read_header(file)


def shard_header(content: bytes, place: Path, _: Any) -> None:
    """The JSON of a shard's header, before sixty-four bytes of tensors."""
    shard(struct.pack("<Q", len(content)) + content + bytes(64), place, _)


def gguf_config(content: bytes, place: Path, _: Any) -> None:
    """`config.json` on its way into the metadata of a GGUF file."""
    _gguf(place, {"config.json": content})


def gguf_tokenizer(content: bytes, place: Path, _: Any) -> None:
    """`tokenizer.json` on its way into the metadata of a GGUF file."""
    _gguf(place, {"tokenizer.json": content})


def _gguf(place: Path, given: Mapping[str, bytes]) -> None:
    values = struct.pack("<Q", len(_EMBEDDING)) + _EMBEDDING + bytes(64)
    sound = {"config.json": SEEDS["gguf config"][0], "tokenizer.json": SEEDS["gguf tokenizer"][0]}
    for name, each in {**sound, "model.safetensors": values, **given}.items():
        _written(each, place / name)
    write_gguf(place, place / "model.gguf", "f16", name="m")


def index(content: bytes, place: Path, _: Any) -> None:
    """`model.safetensors.index.json`."""
    _written(b'{"model_type": "llama"}', place / "config.json")
    _written(content, place / "model.safetensors.index.json")
    open_checkpoint(place)


def saved_state(content: bytes, place: Path, _: Any) -> None:
    """A saved state: its first byte says which file; half of them with a manifest that agrees."""
    states = place / "states" / "step-00000004"
    which, content = content[:1] or b"\0", content[1:]
    files = dict.fromkeys(_STATE_FILES, b"{}") | {"manifest.json": b"{}"}
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    files[_STATE_FILES[0]] = files[_STATE_FILES[1]] = struct.pack("<Q", len(header)) + header + b"x"
    files[_STATE_FILES[2]] = b'{"format_version": 1, "step": 4}'
    name = [*files][which[0] % len(files)]
    files[name] = content
    if name != "manifest.json" or which[0] >= 128:
        manifest = {
            n: {"bytes": len(files[n]), "sha256": hashlib.sha256(files[n]).hexdigest()}
            for n in _STATE_FILES
        }
        files["manifest.json"] = json.dumps(manifest).encode()
    for each, written in files.items():
        _written(written, states / each)
    newest_good_state(states.parent, lambda _: None)


def run_folder(content: bytes, place: Path, _: Any) -> None:
    """What a run folder tells: its environment and its metrics."""
    _written(b"", place / "run.yaml")
    read_metrics(_written(content, place / "metrics.jsonl"))
    cut_metrics(place / "metrics.jsonl", 2)
    base_trained_on(_written(content, place / "environment.json").parent)


def command_line(content: bytes, place: Path, _: Any) -> None:
    """The words after `qlora`, apart by line breaks; none that would write or measure."""
    words = [w for w in content.decode("utf-8", "replace").split("\n") if w and "\0" not in w]
    if words[:1] in (["init"], ["doctor"]):
        return
    here = Path.cwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(words)
    except SystemExit as end:  # a wrong word is 2; `profile` says with 3 and 4 what fits
        if end.code not in (0, 2, 3, 4, None):
            raise
    finally:
        os.chdir(here)


TARGETS: dict[str, Target] = {
    "run file": run_file,
    "override": override,
    **{f"rows {s}": rows_of(s) for s in (".jsonl", ".json", ".csv", ".txt", ".conll", ".parquet")},
    "rows .jsonl.gz": rows_of(".jsonl.gz"),
    "chat template": template,
    "adapter config": adapter_config,
    "adapter weights": adapter_weights,
    "model config": model_config,
    "safetensors": shard,
    "safetensors header": shard_header,
    "gguf config": gguf_config,
    "gguf tokenizer": gguf_tokenizer,
    "index": index,
    "saved state": saved_state,
    "run folder": run_folder,
    "command line": command_line,
}


def run_target(name: str, content: bytes, place: Path, tokenizer: Any) -> None:
    """Feed one input; what is made for users is swallowed.

    Args:
        name: Of `TARGETS`.
        content: The input.
        place: An empty folder.
        tokenizer: For templates; `small_tokenizer`.
    """
    with contextlib.suppress(*FOR_USERS):
        TARGETS[name](content, place, tokenizer)


def small_tokenizer() -> Any:
    """A real tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
