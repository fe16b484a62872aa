"""Small real tokenizers, trained on a few sentences, so that no test here needs a download."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The capital of France is Paris.",
    "Is this review positive or negative?\n\nA fine film.\n\nIt was good.",
    "user\nassistant\nsystem\nHello there, how are you? I am fine.\n\n",
    "Below is an instruction that describes a task. Write a response.",
    "### Instruction:\n\n### Response:\n yes no maybe positive negative",
    "get_weather arguments name city temperature tool_call <think>\n\n</think>\n\n",
] * 3


def _finish(
    tokenizer: Tokenizer, specials: list[str], bos: str | None, eos: str, add_bos: bool
) -> Any:
    if add_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )


def byte_level(
    specials: list[str], *, eos: str, bos: str | None = None, add_bos: bool = False
) -> Any:
    """GPT-2's kind: bytes, merges, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer, specials, bos, eos, add_bos)


def metaspace(specials: list[str], *, eos: str, bos: str, add_bos: bool = True) -> Any:
    """SentencePiece's kind: a space is a visible character, bytes stand in for unknown ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *specials, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer, specials, bos, eos, add_bos)


@pytest.fixture(scope="session")
def make_byte_level() -> Callable[..., Any]:
    return byte_level


@pytest.fixture(scope="session")
def make_metaspace() -> Callable[..., Any]:
    return metaspace


@pytest.fixture
def chatml_tokenizer() -> Any:
    """ChatML specials; pad is EOS is the end of turn, the trap that hides EOS from trainers."""
    from tests.data.templates import CHATML

    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def plain_tokenizer() -> Any:
    """A base model's: BOS in front, EOS, no chat template."""
    return byte_level(["<s>", "</s>"], eos="</s>", bos="<s>", add_bos=True)
