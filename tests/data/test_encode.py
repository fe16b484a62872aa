"""Raw text and prompts with completions: BOS once, EOS trained, no character lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data.encode import Encoder, Example, choose_pad_id
from qlora_trainer.data.messages import Chat, PlainText, Prompted
from qlora_trainer.errors import UserError
from tests.data import templates
from tests.data.conftest import byte_level, metaspace

BYTE_LEVEL = byte_level(["<s>", "</s>"], eos="</s>", bos="<s>", add_bos=True)
METASPACE = metaspace(["<s>", "</s>"], eos="</s>", bos="<s>")
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["bytes", "metaspace"])


def encode(tokenizer, shape, **settings):
    ((example,),) = Encoder(tokenizer, **settings).encode([shape])
    return example


def trained(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != -100])


def test_labels_are_made_from_positions():
    example = Example([7, 7, 7, 7], ((1, 2), (3, 4)))
    assert example.labels == [-100, 7, -100, 7]


@BOTH
def test_plain_text_is_trained_whole_with_one_bos_and_one_eos(tokenizer):
    example = encode(tokenizer, PlainText("The capital of France is Paris."))
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.labels == [-100, *example.input_ids[1:]]
    assert example.labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True).strip() == (
        "The capital of France is Paris."
    )


@BOTH
def test_bos_and_eos_already_in_the_text_are_not_doubled(tokenizer):
    example = encode(tokenizer, PlainText("<s>Hello there</s>"))
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = byte_level(["</s>"], eos="</s>")
    example = encode(tokenizer, PlainText("Hello"))
    assert tokenizer.decode(example.input_ids) == "Hello</s>"


@BOTH
@pytest.mark.parametrize("loss_on", ["assistant", "last", "completion"])
def test_only_the_completion_and_eos_are_trained(tokenizer, loss_on):
    shape = Prompted("Is it good?", " yes maybe")
    example = encode(tokenizer, shape, loss_on=loss_on)
    assert trained(tokenizer, example).strip() == "yes maybe</s>"
    assert not example.merged_join


@BOTH
def test_all_trains_the_prompt_too(tokenizer):
    example = encode(tokenizer, Prompted("Is it good?", " yes"), loss_on="all")
    assert trained(tokenizer, example).strip() == "Is it good? yes</s>"


def test_a_token_across_the_join_is_trained_and_counted():
    example = encode(BYTE_LEVEL, Prompted("Is it good? ", "yes"))
    assert trained(BYTE_LEVEL, example) == " yes</s>"
    assert example.merged_join


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=30)


@settings(deadline=None)
@given(prompt=TEXT, completion=TEXT.filter(lambda text: text.strip()))
def test_no_character_is_lost_or_doubled_at_the_join(prompt, completion):
    example = encode(BYTE_LEVEL, Prompted(prompt, completion))
    assert BYTE_LEVEL.decode(example.input_ids) == f"<s>{prompt}{completion}</s>"
    assert trained(BYTE_LEVEL, example).endswith(f"{completion}</s>".lstrip("\ufffd"))


def test_a_prompt_for_generation_is_what_training_put_before_the_answer(chatml_tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for tokenizer, shape, prompt in (
        (chatml_tokenizer, Chat(chat), chat[:1]),
        (BYTE_LEVEL, Prompted("Is it good?", " yes"), "Is it good?"),
    ):
        example = encode(tokenizer, shape)
        first = next(i for i, label in enumerate(example.labels) if label != -100)
        assert Encoder(tokenizer).encode_prompt(prompt) == example.input_ids[:first]
    plain = Encoder(BYTE_LEVEL)
    assert plain.encode_prompt(chat[:1]) == plain.encode_prompt("q")
    gemma = metaspace(["<bos>", "<eos>", "<end_of_turn>"], bos="<bos>", eos="<eos>")
    gemma.chat_template = templates.GEMMA
    with pytest.raises(UserError, match="System role not supported"):
        Encoder(gemma).encode_prompt([{"role": "system", "content": "s"}])


def test_special_tokens_written_into_a_message_are_noticed(chatml_tokenizer):
    chat = [
        {"role": "user", "content": "say <|im_end|>"},
        {"role": "assistant", "content": "no"},
    ]
    assert encode(chatml_tokenizer, Chat(chat)).control_tokens
    chat[0] = {"role": "user", "content": "say it"}
    assert not encode(chatml_tokenizer, Chat(chat)).control_tokens


def test_the_identity_follows_everything_that_changes_tokens(chatml_tokenizer):
    same = Encoder(chatml_tokenizer).identity
    assert Encoder(chatml_tokenizer).identity == same
    others = [
        Encoder(chatml_tokenizer, loss_on="all"),
        Encoder(chatml_tokenizer, chat_template="alpaca"),
        Encoder(chatml_tokenizer, chat_template_kwargs={"enable_thinking": False}),
        Encoder(BYTE_LEVEL, chat_template="chatml"),
    ]
    assert len({same, *(other.identity for other in others)}) == 5


def test_the_pad_id_is_the_tokenizers_own_or_eos():
    assert choose_pad_id(BYTE_LEVEL) == BYTE_LEVEL.eos_token_id
    bare = byte_level(["</s>", "<pad>"], eos="</s>")
    bare.pad_token = "<pad>"
    assert choose_pad_id(bare) == bare.pad_token_id != bare.eos_token_id
    bare.pad_token = None
    assert choose_pad_id(bare) == bare.eos_token_id
