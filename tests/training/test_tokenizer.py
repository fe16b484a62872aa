"""A tokenizer is written as transformers 4 knows it, and transformers 5 reads the same tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessorPil

from qlora_trainer.training.tokenizer import older_settings, save_tokenizer

TEXTS = ("calm sea", "a <tool>calm <end> b<end>sea", "<bos>calm\n\n12 seas, unknown?", "", "  sea ")
NEWER = ("is_local", "local_files_only", "backend")


def words_with_extra_tokens() -> Any:
    """Declared plainly, as Llama 3's is, with special tokens beyond the named ones."""
    words = ["<unk>", "<bos>", "<eos>", "calm", "sea", "a", "b", "12"]
    table = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=["<tool>", AddedToken("<end>", lstrip=True)],
    )  # fmt: skip


def written(tokenizer: Any, folder: Path) -> dict[str, Any]:
    save_tokenizer(tokenizer, folder)
    content: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return content


def assert_the_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    assert found.all_special_tokens == expected.all_special_tokens
    assert found.all_special_ids == expected.all_special_ids
    assert found.extra_special_tokens == expected.extra_special_tokens
    assert found.special_tokens_map == expected.special_tokens_map
    for text in (*TEXTS, *expected.all_special_tokens):
        ids = expected(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        for skip in (False, True):
            decoded = found.decode(ids, skip_special_tokens=skip)
            assert decoded == expected.decode(ids, skip_special_tokens=skip)


def test_the_real_tokenizer_is_written_with_the_older_class(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    content = written(tokenizer, tmp_path)
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not any(name in content for name in NEWER)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert_the_same(found, tokenizer)
    assert found.chat_template == tokenizer.chat_template
    assert found.model_max_length == tokenizer.model_max_length


@pytest.mark.parametrize("reopened", [False, True])
def test_a_list_of_extra_special_tokens_gets_its_older_name(tmp_path: Path, reopened: bool) -> None:
    tokenizer = words_with_extra_tokens()
    if reopened:
        tokenizer.save_pretrained(tmp_path / "theirs")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text("utf-8"))
    assert new["extra_special_tokens"] == ["<tool>", "<end>"]  # else nothing is left to rename
    content = written(tokenizer, tmp_path / "ours")
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert content["additional_special_tokens"] == ["<tool>", "<end>"]
    assert not any(name in content for name in (*NEWER, "extra_special_tokens"))
    found = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert_the_same(found, AutoTokenizer.from_pretrained(tmp_path / "new"))
    assert_the_same(found, tokenizer)
    assert written(found, tmp_path / "again") == content
    assert [file.name for file in (tmp_path / "ours").iterdir() if file.name[0] == "."] == []


def test_what_readers_on_transformers_4_know_stays() -> None:
    named = {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert older_settings(named) == named
    both = {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}
    assert older_settings(both) == both


def test_an_image_processor_is_written_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(ViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
